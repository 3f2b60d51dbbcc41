"""A Sphinx extension: every build runs every chapter, since what changed may be the package and not the page."""


def setup(app):
    """Called by Sphinx. What is expensive in a chapter is its runs, and those are stored."""
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: [
        name for name in env.found_docs if str(env.doc2path(name)).endswith(".ipynb")])
    return {"parallel_read_safe": True}
