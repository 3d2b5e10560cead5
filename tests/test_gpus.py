"""GPUs: the shipped figures against datasheets and physics; every refusal."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energymodel.datafiles import data_path
from energymodel.errors import ProfileError
from energymodel.gpus import list_gpus, load_gpu

WANTED = {
    *("a100", "a100-pcie-80gb", "a100-40gb", "h100", "h100-pcie", "h200", "b200"),
    *("l40s", "a6000", "rtx-6000-ada", "l4", "mi300x"),
}
# Dense fp16/bf16 FLOPs per clock of one SM or CU, from the vendors' architecture papers: A100
# 1024 FMA (A100 whitepaper, table 1), GA102 and Ada 512, Hopper 2048, CDNA 3 2048 FLOPs,
# Blackwell 4096 FMA (2.25 PFLOPS from 148 SMs).
FLOPS_PER_CLOCK = {
    **dict.fromkeys(("a100", "a100-pcie-80gb", "a100-40gb"), 2048),
    **dict.fromkeys(("a6000", "l40s", "rtx-6000-ada", "l4"), 1024),
    **dict.fromkeys(("h100", "h100-pcie", "h200"), 4096),
    "b200": 8192,
    "mi300x": 2048,
}


def a100_document():
    return json.loads(data_path("gpus", "a100.json").read_text())


def test_all_wanted_gpus_are_there():
    assert set(list_gpus()) == WANTED


@pytest.mark.parametrize("name", list_gpus())
def test_every_field_has_a_source_and_a_sane_value(name):
    gpu = load_gpu(name)
    assert gpu.name == name
    stated = {"name", "sources"}
    fields = set(gpu.__dataclass_fields__) - stated
    assert set(gpu.sources) == fields
    assert all(len(source) > 5 for source in gpu.sources.values())
    assert 16e9 < gpu.hbm_bytes < 300e9
    assert 2e11 < gpu.hbm_bytes_per_s < 1e13
    assert 1e9 < gpu.boost_clock_hz < 3e9
    assert 50 < gpu.tdp_watts <= 1000
    assert 10e9 < gpu.link_bytes_per_s <= 900e9
    assert gpu.idle_watts is None or 0 < gpu.idle_watts < gpu.tdp_watts / 2


@pytest.mark.parametrize("name", list_gpus())
def test_peaks_are_dense(name):
    """The peak is what the SMs do per clock; a sparse figure would be twice that."""
    gpu = load_gpu(name)
    per_clock = FLOPS_PER_CLOCK[name] * gpu.sm_count
    assert 0.9 < gpu.peak_flops_per_s["bf16"] / (per_clock * gpu.boost_clock_hz) < 1.001


@pytest.mark.parametrize("name", list_gpus())
def test_narrow_dtypes_double_the_peak_and_fp8_is_where_the_hardware_has_it(name):
    gpu = load_gpu(name)
    peaks = gpu.peak_flops_per_s
    assert peaks["fp16"] == peaks["bf16"]
    assert ("fp8" in peaks) == (gpu.architecture != "ampere")
    assert ("mxfp4" in peaks) == (gpu.architecture == "blackwell")
    for dtype in {"fp8", "int8"} & set(peaks):
        assert peaks[dtype] / peaks["bf16"] == pytest.approx(2.0, rel=0.015)


@pytest.mark.parametrize(
    ("name", "flops_per_byte"),
    [
        ("a100", 153.0),  # 312 TFLOPS over 2.039 TB/s
        ("a100-40gb", 200.6),  # over 1.555
        ("h100", 295.3),  # 989.4 over 3.35
        ("h200", 206.1),  # over 4.8
        ("l4", 403.3),  # 121 over 0.3
        ("mi300x", 246.7),  # 1307.4 over 5.3
    ],
)
def test_ridge_points(name, flops_per_byte):
    gpu = load_gpu(name)
    ridge = gpu.peak_flops_per_s["bf16"] / gpu.hbm_bytes_per_s
    assert ridge == pytest.approx(flops_per_byte, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA L4", "l4"),
        ("A100-SXM4-80GB", "a100"),
        ("A100", "a100"),
        (" h100_sxm ", "h100"),
        ("RTX 6000 ADA", "rtx-6000-ada"),
    ],
)
def test_aliases(name, expected):
    assert load_gpu(name).name == expected


def test_no_name_means_two_gpus():
    names = {}
    for gpu in map(load_gpu, list_gpus()):
        for name in (gpu.name, gpu.title, *gpu.aliases):
            plain = name.lower().replace("-", " ").replace("_", " ")
            assert names.setdefault(plain, gpu.name) == gpu.name


def test_gpu_from_a_file_of_the_users(tmp_path):
    document = a100_document()
    document["tdp_watts"] = {"value": 250, "source": "nvidia-smi -pl 250"}
    document["aliases"]["value"] = []
    file = tmp_path / "My_A100.json"
    file.write_text(json.dumps(document))
    gpu = load_gpu(str(file))
    assert (gpu.name, gpu.tdp_watts, gpu.sources["tdp_watts"]) == (
        "my-a100",
        250.0,
        "nvidia-smi -pl 250",
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tdp_watts", None, "tdp_watts.value must be a positive number"),
        ("tdp_watts", -1, "tdp_watts.value must be a positive number"),
        ("tdp_watts", float("nan"), "tdp_watts.value must be a positive number"),
        ("tdp_watts", "400", "tdp_watts.value must be a positive number"),
        ("tdp_watts", 10**400, "tdp_watts.value must be a positive number"),
        ("sm_count", 1.5, "sm_count.value must be a whole number"),
        ("title", "", "title.value must be text"),
        ("aliases", "a100", "aliases.value must be a list"),
        ("aliases", ["a", 1], r"aliases.value\[1\] must be text"),
        ("peak_flops_per_s", {}, "peak_flops_per_s.value must be an object"),
        ("peak_flops_per_s", {"fp4": 1}, "unknown dtypes fp4. Known: bf16"),
        ("peak_flops_per_s", {"bf16": 0}, "peak_flops_per_s.value.bf16 must be a positive number"),
        ("idle_watts", "low", "idle_watts.value must be a positive number"),
    ],
)
def test_refused_values_name_the_field(tmp_path, field, value, message):
    document = a100_document()
    document[field]["value"] = value
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=message) as error:
        load_gpu(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("l2_bytes"), "missing fields l2_bytes"),
        (lambda d: d.update(colour={"value": 1, "source": "x"}), "unknown fields colour"),
        (lambda d: d["l2_bytes"].pop("source"), 'l2_bytes must be {"value"'),
        (lambda d: d["l2_bytes"].update(source=" "), "l2_bytes.source must say"),
        (lambda d: d.update(l2_bytes=4e7), 'l2_bytes must be {"value"'),
    ],
)
def test_refused_documents(tmp_path, change, message):
    document = a100_document()
    change(document)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=message):
        load_gpu(str(file))


def test_names_and_files_that_lead_nowhere(tmp_path):
    with pytest.raises(ProfileError, match=r"unknown GPU 'h1000'.*Did you mean h100"):
        load_gpu("h1000")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_gpu(str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ProfileError, match="not a list"):
        load_gpu(str(tmp_path / "list.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_gpu(str(tmp_path / "binary.json"))
    for name in ("", "\0", "\0.json", "x" * 9000 + ".json"):
        with pytest.raises(ProfileError):
            load_gpu(name)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["value", "source", "bf16"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*a100_document(), "other"]), JUNK, max_size=3))
def test_junk_never_raises_anything_but_our_error(tmp_path_factory, changes):
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    file.write_text(json.dumps({**a100_document(), **changes}))
    try:
        gpu = load_gpu(str(file))
    except ProfileError as error:
        assert str(file) in str(error)
    else:
        assert gpu.tdp_watts > 0
