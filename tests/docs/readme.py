"""Find and run the code blocks of a Markdown file, so that what the README shows is what works.

python tests/docs/readme.py install-and-test README.md   # print its install-and-test command
python tests/docs/readme.py run README.md                # run every Python block, each in a process
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(markdown: str, language: str) -> list[str]:
    """Return the fenced blocks of one language, in order."""
    return [body for name, body in _BLOCK.findall(markdown) if name == language]


def install_and_test_command(markdown: str) -> str:
    """Return the one shell line that installs the project and runs its tests."""
    lines = [line for block in code_blocks(markdown, "bash") for line in block.splitlines()]
    matching = [line for line in lines if "pip install" in line and line.rstrip().endswith("pytest")]
    if len(matching) != 1:
        raise SystemExit(f"expected one install-and-test line, found {len(matching)}: {matching}")
    return matching[0]


def run_python_blocks(markdown: str) -> None:
    """Run every Python block in a fresh process and folder; stop at the first that fails."""
    blocks = code_blocks(markdown, "python")
    if not blocks:
        raise SystemExit("no Python block found")
    for number, block in enumerate(blocks, start=1):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "block.py")
            script.write_text(block)
            print(f"README Python block {number} of {len(blocks)}", flush=True)
            subprocess.run([sys.executable, "-W", "error::UserWarning", script], cwd=folder, check=True)


if __name__ == "__main__":
    action, path = sys.argv[1:]
    text = Path(path).read_text()
    if action == "install-and-test":
        print(install_and_test_command(text))
    elif action == "run":
        run_python_blocks(text)
    else:
        raise SystemExit(f"unknown action {action!r}")
