"""A Sphinx extension: every build runs every chapter, since the package may have changed where the page has not. It says which
chapter it is at, puts claims.json beside the pages, and links them to the repository where `_config.yml` has its address."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from sphinx.util.logging import NAMESPACE, InfoFilter, getLogger

from ihbook.chapters import kernel

logger = getLogger(__name__)


def setup(app):
    """Called by Sphinx. Every notebook counts as outdated; stored runs keep that cheap. Progress goes to this terminal."""
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: [
        name for name in env.found_docs if str(env.doc2path(name)).endswith(".ipynb")])
    app.connect("env-before-read-docs", _count)
    app.connect("build-finished", _publish)
    app.setup_extension("sphinx.ext.autodoc")  # its event must be there to be connected
    app.connect("autodoc-process-signature", _readable)
    app.connect("config-inited", _link)
    terminal = f"/proc/{os.getpid()}/fd/2"
    with suppress(OSError):
        terminal = os.ttyname(2)
    if Path(terminal).exists():
        os.environ.setdefault("IHBOOK_PROGRESS", terminal)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(kernel.FOLDER), os.environ.get("JUPYTER_PATH")]))
    if not app.verbosity:
        _hush()
    return {"parallel_read_safe": True}


def _hush():
    """Apart from warnings, show only this extension's messages in the terminal (`jupyter-book build -v` shows everything)."""
    for handler in logging.getLogger(NAMESPACE).handlers:
        if any(isinstance(each, InfoFilter) for each in handler.filters):
            handler.addFilter(logging.Filter(f"{NAMESPACE}.{__name__}"))


def _count(app, env, names):
    """Name each page, and its place among those to read, when its turn comes; a chapter is run then."""
    places = {name: i for i, name in enumerate(names, 1)}
    app.connect("source-read", lambda app, name, source: logger.info("%d of %d: %s", places[name], len(places), name))


def _publish(app, error):
    """Put the claims as the last page of the build found them (`evidence.of_build`) beside the pages."""
    from ihbook.engine.store import default_root

    found = default_root() / "claims.json"
    if error is None and app.builder.format == "html" and found.exists():
        shutil.copy(found, app.outdir)


def _readable(app, what, name, obj, options, signature, returns):
    """Sphinx can't read the <factory> that a dataclass's signature has for a default that is made; `...` it can."""
    return signature and signature.replace("<factory>", "..."), returns


def _link(app, config):
    """Give each page the buttons for the repository and for Binder; without an address, no page has them."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = True
    else:
        for name in ("use_repository_button", "launch_buttons"):
            options.pop(name, None)
