"""Counting the experts that a vLLM model chooses, on stand-ins for its layers."""

import numpy as np
import pytest

from calibration.serving.expert_counts import counted_experts, summarised


class Logits(np.ndarray):
    """An array with the one method of a tensor that is needed."""

    def topk(self, k, dim):
        assert dim == -1

        class Top:
            indices = np.argsort(-np.asarray(self), axis=-1)[:, :k]

        return Top


class Router:
    def __init__(self):
        self.capture = None

    def set_capture_fn(self, capture):
        self.capture = capture


class Method:
    is_monolithic = True

    def apply_monolithic(self, *, layer, x, router_logits, input_ids=None):
        return x + 1


class Layer:
    top_k = 2

    def __init__(self, method, router):
        self.quant_method, self.router = method, router


def test_routers_are_asked_and_left_as_they_were():
    layer = Layer(None, Router())
    with counted_experts([object(), layer]) as seen:
        layer.router.capture(np.array([[0, 1], [0, 3], [0, 1]]))
        layer.router.capture(np.array([[0, 1], [2, 3], [4, 5]]))
    assert layer.router.capture is None
    assert summarised(seen, batch=3) == [
        {
            "batch": 3,
            "step_tokens": 3,
            "layer_steps": 2,
            "distinct_mean": 4.5,
            "distinct_min": 3.0,
            "distinct_max": 6.0,
            "fullest_share_mean": pytest.approx((1.0 + 1 / 3) / 2),
        }
    ]


def test_a_kernel_that_chooses_itself_is_counted_by_its_logits():
    method = Method()
    layer = Layer(method, Router())
    logits = np.array([[0.1, 3.0, 2.0, 0.0], [5.0, 0.0, 0.0, 4.0]]).view(Logits)
    with counted_experts([layer]) as seen:
        assert method.apply_monolithic(layer=layer, x=1, router_logits=logits) == 2
        assert layer.router.capture is None  # never called by such a kernel
    assert seen == {2: [(4, 0.5)]}
    method.apply_monolithic(layer=layer, x=1, router_logits=logits)
    assert len(seen[2]) == 1, "counting went on after the block"
    assert "apply_monolithic" not in vars(method)


def test_layers_are_left_as_they_were_after_an_error():
    method = Method()
    with pytest.raises(RuntimeError), counted_experts([Layer(method, None)]):
        raise RuntimeError
    assert "apply_monolithic" not in vars(method)
