"Everything comes from settings.ini: the one place to change a name, a version or a requirement"

from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
c = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): c[k].split() for k in c if k.endswith("_requirements")}

setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    author=c["author"],
    url=c["git_url"],
    keywords=c["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(
        Path("README.md").read_text(encoding="utf-8")
        if Path("README.md").exists()
        else c["description"]
    ),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[c["lib_path"], c["lib_path"] + ".*"]),
    package_data={c["lib_path"]: ["weights/*"]},
    python_requires=">=" + c["min_python"],
    install_requires=c["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": c["console_scripts"].split("\n"),
        "nbdev": [f"{c['lib_path']}={c['lib_path']}._modidx:d"],
    },
)
