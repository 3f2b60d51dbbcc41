"""Where the kernel is that runs a chapter in a build and in a sweep, in place of the usual kernel named python3."""

from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets import default

FOLDER = Path(__file__).parent / "jupyter"  # for JUPYTER_PATH; see kernels/python3/start.py


class Manager(AsyncKernelManager):
    """Starts this kernel for whoever can name a manager, such as papermill (`kernel_manager_class`)."""

    @default("kernel_spec_manager")
    def _these_kernels(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[str(FOLDER / "kernels")])
