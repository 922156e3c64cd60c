"""What README.md and docs/ tell a reader to do, done."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import needs_fast

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def edited(source):
    """The source with every ```diff block of the walkthrough's section "Add a norm" applied."""
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    section = page.split("## Add a norm")[1].split("\n## ")[0]
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        lines = diff.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert source.count(old) == 1, f"tinygpt.py does not say {old!r} once"
        source = source.replace(old, new)
    return source


def check(folder, *kernels):
    words = [sys.executable, "tinygpt.py", "check", "--set", "norm=l1norm", "--kernels", *kernels]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path):
    """tinygpt.py with the norm, its text; beside where it belongs, the command line of the checks."""
    (tmp_path / "extras").mkdir()
    for name in ("__init__.py", "check.py"):
        shutil.copy(ROOT / "extras" / name, tmp_path / "extras")
    return edited((ROOT / "tinygpt.py").read_text(encoding="utf-8"))


def test_a_norm_is_added_in_three_edits_and_proved(tmp_path, source):
    (tmp_path / "tinygpt.py").write_text(source, encoding="utf-8")
    missing = check(tmp_path, "fast")
    assert missing.returncode == 2 and "--kernels fast needs the folder fast/ beside tinygpt.py" in missing.stderr
    done = check(tmp_path, "numpy", "numba")
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr
    assert done.stdout.splitlines()[1].split() == ["tensor", "numpy", "numba"]


@needs_fast
def test_a_norm_without_a_kernel_is_refused_by_fast_in_one_line(tmp_path, source):
    (tmp_path / "tinygpt.py").write_text(source, encoding="utf-8")
    shutil.copytree(ROOT / "fast", tmp_path / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    refused = check(tmp_path, "fast")
    assert refused.returncode == 2 and "has no kernel" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("kernels", ["numpy", pytest.param("numba", marks=pytest.mark.slow)])
def test_the_same_norm_with_a_wrong_sign_is_not_proved(tmp_path, source, kernels):
    wrong = source.replace("r * (dn - sign * (dn * n)", "r * (dn + sign * (dn * n)")
    assert wrong != source
    (tmp_path / "tinygpt.py").write_text(wrong, encoding="utf-8")
    done = check(tmp_path, kernels)
    assert done.returncode == 1 and "FAILED" in done.stdout


def anchor(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), link


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
