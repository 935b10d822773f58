"""Ships the top-level conf/ inside the wheel as mtl_cli/conf; everything else is pyproject.toml.

An editable install maps the package to the checkout, where ``config.conf_dir`` finds conf/ itself.
"""

from pathlib import Path
from shutil import copy2, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConf(build_py):
    """Copies conf/ beside the modules of the built package."""

    def run(self) -> None:
        """Build the modules, then add the YAML files unless the install is editable."""
        super().run()
        if not self.editable_mode:
            rmtree(Path(self.build_lib) / "mtl_cli" / "conf", ignore_errors=True)
            for target, source in self._conf().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy2(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Files of the build, conf/ included."""
        outputs = list(super().get_outputs(include_bytecode))
        return outputs if self.editable_mode else [*outputs, *map(str, self._conf())]

    def get_source_files(self) -> list[str]:
        """Files of a source distribution."""
        conf = (path.relative_to(ROOT) for path in self._conf().values())
        return [*super().get_source_files(), *map(str, conf)]

    def _conf(self) -> dict[Path, Path]:
        target = Path(self.build_lib) / "mtl_cli" / "conf"
        files = sorted((ROOT / "conf").rglob("*.yaml"))
        return {target / path.relative_to(ROOT / "conf"): path for path in files}


setup(cmdclass={"build_py": BuildWithConf})
