"""The kernel that runs a chapter in a build and in a sweep: ipykernel, made to start and end faster, and to warn less."""

import gc
import logging
import sys

from ipykernel.kernelapp import IPKernelApp

# What any kernel may say: that it uses TCP, and, as who ends it first interrupts it, that an interrupt came between two cells.
USUAL = ("TCP without encryption", "KeyboardInterrupt caught in kernel")


def says_something_new(record: logging.LogRecord) -> bool:
    """Whether a log record is not one of ipykernel's usual. An interrupted cell has its own traceback all the same."""
    return not any(usual in record.getMessage() for usual in USUAL)


def import_at_once(_) -> None:
    """Before the first cell, import what nearly every chapter does. All of it stays, so the search for garbage in it, now and at
    the exit, would only take time: a third of what a short chapter needs."""
    kernel.shell.events.unregister("pre_run_cell", import_at_once)
    gc.disable()
    try:
        from ihbook.chapters import claims, experiments, pictures, plots  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


del sys.path[0]  # this folder
kernel = IPKernelApp.instance()
kernel.log.addFilter(says_something_new)
kernel.initialize()
kernel.shell.events.register("pre_run_cell", import_at_once)
kernel.start()
