from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ks_2samp

from energymodel.datafiles import data_path
from energymodel.errors import TraceError
from energymodel.trace_cli import describe, print_description
from energymodel.traces import read_trace
from energymodel.workloads import list_workloads, load_requests

SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published traces are not beside this checkout"
)
SEEDS = (0, 1, 2)
# Public statistics of the Azure 2023 traces: requests, seconds, input and output means, gap CV
AZURE = {
    "azure_code": (8819, 3435.9, 2047.8, 27.9, 13.15),
    "azure_conv": (19366, 3501.7, 1154.7, 211.1, 1.09),
}
# Table 3 of arXiv 2504.17674: input mean, standard deviation, longest, output
TASKS = {
    "translation": (49.96, 39.39, 550, 64),
    "generation": (136.89, 93.13, 547, 64),
    "classification": (292.48, 239.94, 3112, 1),
    "summarization": (838.49, 400.70, 2386, 64),
}


def test_the_built_in_workloads():
    assert set(list_workloads()) == {"burstgpt", *AZURE, *TASKS}


@pytest.mark.parametrize("name", ["burstgpt", *AZURE, *TASKS])
def test_files_are_small_and_cite_their_source(name):
    path = data_path("workloads", f"{name}.json")
    assert path.stat().st_size < 200_000
    data = json.loads(path.read_text())
    assert data["name"] == name
    assert "arXiv" in data["source"] or "github.com/Azure" in data["source"]
    assert data["license"]
    assert data["source"] in load_requests(name).source
    assert sum(data["lengths"]["requests"]) == pytest.approx(data["requests"], rel=1e-4)
    assert sum(data["arrivals"]["requests"]) == data["requests"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", AZURE)
def test_azure_draws_match_the_public_statistics(name, seed):
    count, seconds, input_mean, output_mean, gap_cv = AZURE[name]
    requests = load_requests(name, seed=seed)
    gaps = np.diff(requests.arrival_seconds)
    assert requests.arrival_seconds.size == count
    assert requests.arrival_seconds[-1] == pytest.approx(seconds, rel=0.001)
    assert requests.input_tokens.mean() == pytest.approx(input_mean, rel=0.005)
    assert requests.output_tokens.mean() == pytest.approx(output_mean, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(gap_cv, rel=0.02)


@needs_shared
@pytest.mark.parametrize("name", AZURE)
def test_azure_draws_are_distributed_as_the_trace(name):
    trace = read_trace(str(SHARED / f"azure_llm_2023_{name.removeprefix('azure_')}.csv"))
    drawn = load_requests(name, seed=3)
    for side in ("input_tokens", "output_tokens"):
        pair = (getattr(trace, side), getattr(drawn, side))
        assert ks_2samp(*pair, method="asymp").statistic < 0.03
    in_ten_seconds = [
        np.bincount((r.arrival_seconds / 10).astype(int), minlength=351) for r in (trace, drawn)
    ]
    assert np.corrcoef(*in_ten_seconds)[0, 1] > 0.95
    correlation = [np.corrcoef(r.input_tokens, r.output_tokens)[0, 1] for r in (trace, drawn)]
    assert correlation[1] == pytest.approx(correlation[0], abs=0.03)


def test_burstgpt_draws_match_the_papers_tables():
    # Tables 1 and 2 of arXiv 2504.17674: mean, standard deviation, median, p99
    requests = load_requests("burstgpt", num_requests=50_000)
    for tokens, (mean, std, median, p99) in (
        (requests.input_tokens, (256.80, 242.27, 215, 1038)),
        (requests.output_tokens, (35.10, 108.59, 7, 478)),
    ):
        assert tokens.mean() == pytest.approx(mean, rel=0.01)
        assert tokens.std() == pytest.approx(std, rel=0.02)
        assert np.median(tokens) == pytest.approx(median, rel=0.02)
        assert np.percentile(tokens, 99) == pytest.approx(p99, rel=0.03)


def test_burstgpt_says_that_it_is_fitted():
    requests = load_requests("burstgpt")
    assert requests.arrival_seconds.size == 364
    assert "not to the trace itself" in requests.source


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TASKS)
def test_tasks_match_table_3(name, seed):
    mean, std, longest, output = TASKS[name]
    requests = load_requests(name, seed=seed)
    assert requests.input_tokens.size == 1024
    assert not requests.arrival_seconds.any()
    assert set(requests.output_tokens) == {output}
    assert requests.input_tokens.mean() == pytest.approx(mean, rel=0.01)
    assert requests.input_tokens.std() == pytest.approx(std, rel=0.03)
    assert requests.input_tokens.max() <= longest


def test_draws_are_seeded():
    first, same, other = (load_requests("azure_code", seed=seed) for seed in (7, 7, 8))
    for field in ("arrival_seconds", "input_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(first, field), getattr(same, field))
        assert not np.array_equal(getattr(first, field), getattr(other, field))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["azure_code", "burstgpt", "translation"]),
    count=st.integers(1, 20_000),
    seed=st.integers(0, 2**63),
)
def test_any_number_of_requests(name, count, seed):
    requests = load_requests(name, seed=seed, num_requests=count)
    assert requests.arrival_seconds.size == requests.rows_read == count
    assert requests.arrival_seconds[0] == 0.0
    assert np.all(np.diff(requests.arrival_seconds) >= 0)
    lengths = json.loads(data_path("workloads", f"{name}.json").read_text())["lengths"]
    for tokens, edges in (
        (requests.input_tokens, lengths["input_edges"]),
        (requests.output_tokens, lengths["output_edges"]),
    ):
        assert tokens.dtype == np.int64
        assert tokens.min() >= 1
        assert tokens.max() <= edges[-1]


def test_more_requests_come_at_the_same_rate():
    once, thrice = (load_requests("azure_conv", num_requests=n * 19366) for n in (1, 3))
    assert thrice.arrival_seconds[-1] == pytest.approx(3 * once.arrival_seconds[-1], rel=0.01)


def test_unknown_names_list_the_known():
    with pytest.raises(TraceError, match=r"Did you mean azure_code.*burstgpt"):
        load_requests("azure-code")
    with pytest.raises(TraceError, match="no such file"):
        load_requests("azure_code.csv")
    with pytest.raises(TraceError, match="no such file"):
        load_requests("somewhere/azure_code")
    with pytest.raises(TraceError, match="unknown workload"):
        load_requests("x" * 5000)


def test_senseless_draws_are_refused(tmp_path):
    with pytest.raises(TraceError, match="at least 1"):
        load_requests("azure_code", num_requests=0)
    with pytest.raises(TraceError, match="seed -1"):
        load_requests("azure_code", seed=-1)
    (tmp_path / "t.csv").write_text("arrival_seconds,input_tokens,output_tokens\n0,1,1\n")
    with pytest.raises(TraceError, match="built-in workloads only"):
        load_requests(str(tmp_path / "t.csv"), num_requests=5)


def test_files_come_before_workloads_and_folders_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("burstgpt").write_text("arrival_seconds,input_tokens,output_tokens\n0,12,3\n")
    assert load_requests("burstgpt").input_tokens.tolist() == [12]
    Path("translation").mkdir()
    assert load_requests("translation").input_tokens.size == 1024


@needs_shared
def test_the_script_derives_the_shipped_files(tmp_path):
    spec = importlib.util.spec_from_file_location("derive", data_path("workloads", "derive.py"))
    derive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(derive)
    derive.main(SHARED, tmp_path)
    for name in list_workloads():
        derived = json.loads((tmp_path / f"{name}.json").read_text())
        shipped = json.loads(data_path("workloads", f"{name}.json").read_text())
        assert derived.keys() == shipped.keys()
        assert derived["arrivals"] == shipped["arrivals"]
        for column in ("requests", "mean_input", "mean_output"):
            np.testing.assert_allclose(
                derived["lengths"][column], shipped["lengths"][column], rtol=1e-3, atol=1e-3
            )


def test_description_adds_up_and_is_json():
    requests = load_requests("azure_code")
    found = json.loads(json.dumps(describe(requests), allow_nan=False))
    assert found["requests"] == 8819 == sum(row["requests"] for row in found["bins"])
    assert found["input_tokens"]["total"] == requests.input_tokens.sum()
    tokens = sum(row["requests"] * row["mean_output"] for row in found["bins"])
    assert tokens == pytest.approx(found["output_tokens"]["total"])
    assert found["requests_per_second"] == pytest.approx(2.567, abs=0.005)
    assert set(found["paper_excluded"]) == {"output_too_long"}


def test_description_of_requests_that_come_at_once():
    found = describe(load_requests("translation"))
    assert found["requests_per_second"] is None
    assert found["gap_cv"] is None
    json.dumps(found, allow_nan=False)


def test_printed_description(tmp_path):
    rows = ["0,100,10", "0,0,10", *[f"{t},2000,300" for t in range(5)]]
    path = tmp_path / "[bold]trace.csv"
    path.write_text("\n".join(["arrival_seconds,input_tokens,output_tokens", *rows]))
    text = io.StringIO()
    print_description(read_trace(str(path)), Console(file=text, width=120))
    shown = text.getvalue()
    assert "[bold]trace" in shown
    assert "1 row zero_tokens" in shown
    assert "6 requests in 4.0 s, 1.5 a second" in shown
    assert "1,025-2,048" in shown
    assert "█" * 40 in shown


def test_printed_description_of_one_request(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("arrival_seconds,input_tokens,output_tokens\n5,100,10\n")
    text = io.StringIO()
    print_description(read_trace(str(path)), Console(file=text, width=120))
    assert "1 requests, all at once" in text.getvalue()
