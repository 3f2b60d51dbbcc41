"""Where the book lives: the workflows, Binder, and the links to the repository say what the README and the project say."""

import ast
import os
import re
import shutil
import subprocess
import tomllib

import nbformat
import pytest
import yaml
from conftest import BUILD, ROOT

from ihbook.__main__ import main

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI, BOOK = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text()) for name in ("ci", "book"))
STEPS = [step for workflow in (CI, BOOK) for job in workflow["jobs"].values() for step in job["steps"]]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def using(action):
    """What each step that uses an action gives to it."""
    return [step.get("with", {}) for step in STEPS if step.get("uses", "").startswith(f"actions/{action}@")]


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def pythons():
    """The versions of Python that the README names, from the oldest to the latest."""
    oldest, latest = (numbers(version) for version in re.search(r"Python (3\.\d+) to (3\.\d+)", README).groups())
    return [f"3.{minor}" for minor in range(oldest[1], latest[1] + 1)]


def test_the_workflows_call_what_the_readme_calls():
    commands = [step["run"] for step in STEPS if "run" in step]
    assert ".ci/run" in commands and "pip install -r requirements.txt && jupyter-book build book/" in commands
    for command in commands:
        words = command.split()
        if words[:3] == ["python", "-m", "ihbook"]:
            with pytest.raises(SystemExit) as done:
                main([*words[3:], "--help"])
            assert done.value.code == 0, command
        elif (ROOT / command).is_file():
            assert os.access(ROOT / command, os.X_OK) and README.split("## Test it")[1].split("```")[1].splitlines()[1] in (
                ROOT / command).read_text().replace(" -q ", " ")
        else:
            assert command in README, command


def test_the_workflows_use_the_pythons_of_the_project():
    assert CI["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons()
    assert PROJECT["requires-python"] == f">={pythons()[0]}" and f"(Python {pythons()[0]} to {pythons()[-1]})" in (
        ROOT / "requirements.txt").read_text()
    assert [given["python-version"] for given in using("setup-python")] == ["${{ matrix.python }}", "3.12"]
    assert "3.12" in pythons()
    assert all((ROOT / given["cache-dependency-path"]).exists() for given in using("setup-python"))


def test_the_book_is_built_at_length_where_its_runs_are_kept_and_published():
    assert BOOK[True]["push"]["branches"] == ["main"]  # `on`, which YAML reads as true
    build, publish = BOOK["jobs"]["build"], BOOK["jobs"]["publish"]
    env = build["env"]
    assert env.keys() == {"IHBOOK_STORE", "IHBOOK_CACHE", "PIP_EXTRA_INDEX_URL"}  # no profile: the paper's length
    assert all(env[name].startswith("${{ github.workspace }}/_") for name in ("IHBOOK_STORE", "IHBOOK_CACHE"))
    [cache] = using("cache")
    assert cache["path"].split("\n")[:2] == ["${{ env.IHBOOK_STORE }}", "${{ env.IHBOOK_CACHE }}"]
    assert cache["key"].startswith(cache["restore-keys"])
    for pattern in ast.literal_eval(re.search(r"hashFiles(\(.*?\))", cache["key"])[1]):
        assert list(ROOT.glob(pattern)), pattern
    [pages] = using("upload-pages-artifact")
    assert f"`{pages['path']}/index.html`" in README
    names = [step.get("uses", step.get("run", "")).split("@")[0] for step in build["steps"]]
    order = ["actions/checkout", "actions/setup-python", "actions/cache", "pip install -r requirements.txt && jupyter-book build book/",
             "actions/upload-pages-artifact"]
    assert [name for name in names if name in order] == order
    assert publish["needs"] == "build" and publish["permissions"] == {"pages": "write", "id-token": "write"} and using("deploy-pages")
    assert publish["environment"]["url"] == f"${{{{ steps.{publish['steps'][0]['id']}.outputs.page_url }}}}"


@pytest.mark.parametrize("workflow", [CI, BOOK], ids=["ci", "book"])
def test_a_workflow_ends_may_only_read_and_runs_once(workflow):
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert 5 <= job["timeout-minutes"] <= 180 and job["runs-on"] == "ubuntu-latest"
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
        assert job.get("env", {}).get("PIP_EXTRA_INDEX_URL") == (CPU_INDEX if "setup-python" in str(job) else None)
    assert f"--index-url {CPU_INDEX}" in README


def test_binder_installs_what_the_project_lists_without_cuda():
    """repo2docker reads binder/ alone where it exists, and runs pip at the root: only there does `-e .` mean this project."""
    lines = [line for line in (ROOT / "binder/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [f"--extra-index-url {CPU_INDEX}", "-r ../requirements.txt"]
    assert (ROOT / "binder" / "../requirements.txt").read_text().splitlines()[-1] == "-e ." and (ROOT / "pyproject.toml").exists()
    name, _, version = (ROOT / "binder/runtime.txt").read_text().strip().partition("-")
    assert name == "python" and version in pythons()
    assert {path.name for path in (ROOT / "binder").iterdir()} == {"requirements.txt", "runtime.txt", "start"}
    assert not (ROOT / ".binder").exists()  # repo2docker allows only one of the two


def test_binder_starts_what_it_is_asked_to_with_the_quick_profile():
    def profile(**env):
        command = [ROOT / "binder/start", "sh", "-c", 'echo "$IHBOOK_PROFILE $0" "$@"', "an argument", "another  one"]
        return subprocess.run(command, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True, check=True).stdout

    assert profile() == "quick an argument another  one\n"
    assert profile(IHBOOK_PROFILE="paper").startswith("paper ")


def build_one_page(root, url):
    """Build a book of one notebook with this project's settings and an address; return its page, and what the build said."""
    shutil.copytree(ROOT / "book/_static", root / "book/_static")
    config = (ROOT / "_config.yml").read_text()
    assert config.count('\n  url: ""  #') == 1
    (root / "_config.yml").write_text(config.replace('\n  url: ""  #', f'\n  url: "{url}"  #'))
    (root / "book/_toc.yml").write_text("format: jb-book\nroot: page\n")
    (root / "book/references.bib").write_text("")
    cells = [nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell("6 * 7")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), root / "book/page.ipynb")
    done = subprocess.run(BUILD, cwd=root, env=os.environ | {"IHBOOK_STORE": str(root / "store")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return (root / "_build/html/page.html").read_text(), done.stdout + done.stderr


@pytest.mark.slow
def test_pages_link_to_the_repository_only_where_it_has_an_address(tmp_path):
    page, said = build_one_page(tmp_path / "with", "https://github.com/someone/induction")
    assert 'href="https://github.com/someone/induction"' in page
    assert "https://mybinder.org/v2/gh/someone/induction/main?urlpath=lab/tree/book/page.ipynb" in page
    assert not re.search(r"WARNING:|\d warnings?\b", said)
    page, said = build_one_page(tmp_path / "without", "")
    assert not re.findall(r"mybinder|launch-buttons|source-repository-button|executablebooks/jupyter-book", page)
    assert not re.search(r"WARNING:|\d warnings?\b", said) and "42" in page


def test_the_repository_has_one_address():
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text()).get("repository-code", "")
    assert cited == url
