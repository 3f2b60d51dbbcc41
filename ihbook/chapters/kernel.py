"""The kernel that runs a chapter in a build and in a sweep. `jupyter/kernels/python3/kernel.json` starts it in place of the usual
kernel of that name. It starts and ends faster, and leaves out ipykernel's warning that it talks over TCP without encryption."""

import gc
import logging
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets import default

FOLDER = Path(__file__).parent / "jupyter"  # for JUPYTER_PATH


class Manager(AsyncKernelManager):
    """Starts this kernel for whoever can name a manager, such as papermill (`kernel_manager_class`)."""

    @default("kernel_spec_manager")
    def _these_kernels(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[str(FOLDER / "kernels")])


def main() -> None:
    """Run the kernel, with the command line of ipykernel. The caller has switched the garbage collector off: all that is imported
    here stays, so it would only lose time on it, now and at the exit."""
    from ipykernel.kernelapp import IPKernelApp

    from ihbook.chapters import claims, experiments, pictures, plots  # noqa: F401  # what nearly every chapter imports

    gc.freeze()
    gc.enable()
    kernel = IPKernelApp.instance()
    kernel.log.addFilter(_says_something_new)
    kernel.initialize()
    kernel.start()


def _says_something_new(record: logging.LogRecord) -> bool:
    """Whether a log record is not ipykernel's warning of TCP, which every kernel would repeat. All others are shown."""
    return "TCP without encryption" not in record.getMessage()
