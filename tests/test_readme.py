"""What README.md tells a reader to do, done."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def edited(source):
    """The source with every ```diff block of the README's section "Change it" applied."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Change it")[1].split("\n## ")[0]
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        lines = diff.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert source.count(old) == 1, f"tinygpt.py does not say {old!r} once"
        source = source.replace(old, new)
    return source


def check(folder, *words):
    words = [sys.executable, "tinygpt.py", "check", "--set", "norm=l1norm", *words]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_a_norm_is_added_in_three_edits_and_proved(tmp_path):
    source = (ROOT / "tinygpt.py").read_text(encoding="utf-8")
    (tmp_path / "tinygpt.py").write_text(edited(source), encoding="utf-8")
    missing = check(tmp_path, "--kernels", "fast")
    assert missing.returncode == 2 and "--kernels fast needs the folder fast/ beside tinygpt.py" in missing.stderr
    shutil.copytree(ROOT / "fast", tmp_path / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    done = check(tmp_path, "--kernels", "numpy")
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr
    refused = check(tmp_path, "--kernels", "fast")
    assert refused.returncode == 2 and "has no kernel" in refused.stderr and "Traceback" not in refused.stderr


def test_the_same_norm_with_a_wrong_sign_is_not_proved(tmp_path):
    source = edited((ROOT / "tinygpt.py").read_text(encoding="utf-8"))
    wrong = source.replace("r * (dn - sign * (dn * n)", "r * (dn + sign * (dn * n)")
    assert wrong != source
    (tmp_path / "tinygpt.py").write_text(wrong, encoding="utf-8")
    done = check(tmp_path, "--kernels", "numpy")
    assert done.returncode == 1 and "FAILED" in done.stdout
