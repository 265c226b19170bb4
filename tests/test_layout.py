"""The house rules that a program can check, and what the wheel holds."""

import ast
import statistics
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conftest import ROOT
from peer_scaling.config import run_from, variants
from peer_scaling.paths import config_folder

SOURCES = sorted([*(ROOT / "peer_scaling").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])
STUDIES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


def functions():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_files_and_functions_are_short():
    lengths = dict(functions())
    assert max(len(path.read_text().splitlines()) for path in SOURCES) < 300
    assert statistics.median(lengths.values()) <= 12
    assert {name: n for name, n in lengths.items() if n > 80} == {}


def test_no_hasattr_and_no_pickle():
    for path in SOURCES:
        text = path.read_text()
        assert "hasattr(" not in text, path
        assert "pickle" not in text.replace("never pickle", "").replace("picklable", "").replace(
            "allow_pickle=False", ""
        ), path


@pytest.mark.parametrize("group", ["ffw", "size", "data", "optim", "eval", "tracker"])
def test_every_option_composes_to_a_valid_run(group):
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            extra = ["data.path=x.txt"] if path.stem == "local" else []
            run_from(compose("train", [f"{group}={path.stem}", *extra]))


def test_a_variant_is_a_file_and_a_yaml():
    assert variants() == sorted(path.stem for path in (ROOT / "conf" / "ffw").glob("*.yaml"))


def test_sizes_are_named_by_their_shape():
    for path in (ROOT / "conf" / "size").glob("*.yaml"):
        shape = yaml.safe_load(path.read_text())
        assert path.stem == f"d{shape['d_model']}_l{shape['num_layers']}"


@pytest.mark.parametrize("study", STUDIES)
def test_study_headers_count_their_runs(study):
    path = ROOT / "sweeps" / f"{study}.yaml"
    sweeper = OmegaConf.load(path).hydra.sweeper
    adaptive = sweeper.get("adaptive")  # then the header says how many runs there are to begin with
    cells = sum(
        adaptive.get("start", 4) if adaptive else len(rung.sizes) for rung in sweeper.ladder
    )
    runs = cells * len(sweeper.variants) * len(sweeper.get("seeds", [0]))
    header = path.read_text().split("defaults:")[0]
    assert f"= {runs} runs" in header
    assert f"peer-train --config-name {study}" in header


def test_no_config_names_code():
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
        if "hydra" not in path.parent.parts[-2:]:
            assert "_target_" not in path.read_text(), path


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for line in text.splitlines():
        for part in line.split("`")[1::2]:
            made = part.startswith(("runs/", "DIR/")) or " " in part
            if part.endswith((".py", ".yaml", ".md", ".ipynb")) and not made:
                assert (ROOT / part).exists(), part


def test_published_numbers_name_their_source():
    for path in (ROOT / "analysis" / "published").glob("*.csv"):
        assert path.read_text().startswith("# He 2024, arXiv 2407.04153"), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_code_configs_and_studies(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"peer_scaling", "analysis"}
    for folder in ("conf", "sweeps"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"peer_scaling/{path.relative_to(ROOT)}" in names
    for path in (ROOT / "analysis" / "published").glob("*.csv"):
        assert f"analysis/published/{path.name}" in names
    assert "analysis/style.mplstyle" in names


@pytest.mark.slow
def test_the_wheel_alone_runs_the_smoke_study_elsewhere(wheel, tmp_path):
    """A fresh environment with the wheel; its dependencies are this environment's, linked."""
    environment, packages, elsewhere = (tmp_path / n for n in ("env", "packages", "elsewhere"))
    venv.create(environment, with_pip=True)
    packages.mkdir()
    for entry in Path(yaml.__file__).parent.parent.iterdir():
        if "peer_scaling" not in entry.name and not entry.name.endswith(".pth"):
            (packages / entry.name).symlink_to(entry)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{packages}\n")
    bin_folder = environment / "bin"
    install = [str(bin_folder / "pip"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere.mkdir()
    where = [str(bin_folder / "python"), "-c", "import peer_scaling; print(peer_scaling.__file__)"]
    origin = subprocess.run(where, cwd=elsewhere, capture_output=True, text=True, check=True).stdout
    assert origin.startswith(str(site))
    smoke = [str(bin_folder / "peer-train"), "--config-name", "smoke"]
    result = subprocess.run(smoke, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list((elsewhere / "runs" / "smoke").glob("*/record.json"))) == 8
