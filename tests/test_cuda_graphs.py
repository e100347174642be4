"""CUDA graphs and the attention of short sequences: what a GPU computes by them, and where they are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from running import MAE, SETTINGS, losses, refused, start, weights

from mae_dist.__main__ import main
from mae_dist.models.short_attention import short_attention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [(2, 50, 3, 64), (2, 197, 2, 32), (1, 17, 2, 16), (1, 65, 2, 80)]
"""Samples, tokens, heads, channels of a head."""


def attention_and_gradient(qkv: torch.Tensor, heads: int, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch, in fp32."""
    qkv = qkv.detach().float().requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, heads, -1)).unbind(2))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out.backward(d_out.float())
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def test_short_attention_kernels_equal_torch_in_the_interpreter() -> None:
    """Triton's interpreter runs the kernels on a CPU, in fp32; it is chosen before Triton is imported."""
    pytest.importorskip("triton")
    code = """
import torch
from test_cuda_graphs import attention_and_gradient
from mae_dist.models.short_attention import short_attention
for b, n, h, c in [(1, 50, 2, 24), (1, 70, 1, 16)]:
    qkv, d_out = torch.randn(b, n, 3 * h * c, requires_grad=True), torch.randn(b, n, h * c)
    expected, gradient = attention_and_gradient(qkv, h, d_out)
    out = short_attention(qkv, h)
    out.backward(d_out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(qkv.grad, gradient)
"""
    tests = Path(__file__).parent
    environ = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, cwd=tests.parent)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_short_attention_on_a_gpu_is_as_exact_as_torch(dtype: torch.dtype, compiled: bool) -> None:
    for b, n, h, c in SHAPES:
        qkv = torch.randn(b, n, 3 * h * c, device="cuda", dtype=dtype, requires_grad=True)
        d_out = torch.randn(b, n, h * c, device="cuda", dtype=dtype)
        out = (torch.compile(short_attention) if compiled else short_attention)(qkv, h)
        out.backward(d_out)
        expected, gradient = attention_and_gradient(qkv, h, d_out)
        q, k, v = (part.transpose(1, 2) for part in qkv.detach().unflatten(2, (3, h, c)).unbind(2))
        theirs = F.scaled_dot_product_attention(q, k, v)
        error = (theirs.transpose(1, 2).flatten(2) - expected).norm() / expected.norm()
        assert (out - expected).norm() / expected.norm() <= 1.5 * error
        assert qkv.grad is not None
        assert (qkv.grad - gradient).norm() / gradient.norm() <= 8 * error


def test_cuda_graphs_are_refused_on_a_cpu(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "train.steps=1"]
    assert "machine.cuda_graphs=true: one rank with a GPU" in refused(capsys, *words, "machine.cuda_graphs=true")
    line = refused(capsys, *words, "machine.short_attention=true")
    assert "machine.short_attention=true: its kernels need" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_cuda_graphs_train_as_without_and_resume_to_the_same_bits(
    precision: str, tiny_data: Path, tmp_path: Path
) -> None:
    """With several micro-batches a step, of which the last is smaller; the resumed run captures its own graphs. Each in
    a process of its own: torch asks cuBLAS only once whether it is deterministic.
    """
    words = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "train.steps=8", "checkpoint.every=4"]
    words += [f"train.precision={precision}", "machine.micro_batch=6", "machine.deterministic=true"]
    graphs = [*words, "machine.cuda_graphs=true"]
    start(*words, f"out={tmp_path / 'eager'}")
    start(*graphs, f"out={tmp_path / 'graphs'}")
    torch.testing.assert_close(losses(tmp_path / "graphs"), losses(tmp_path / "eager"), rtol=1e-3, atol=1e-4)
    again = shutil.copytree(tmp_path / "graphs", tmp_path / "again")
    (again / "result.json").unlink()
    shutil.rmtree(again / "checkpoints" / "step-000000008")
    start(*graphs, f"out={again}")
    assert losses(again) == losses(tmp_path / "graphs")
    first, second = weights(tmp_path / "graphs"), weights(again)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("verb", ["finetune", "probe"])
def test_cuda_graphs_train_on_labels(verb: str, tiny_data: Path, tmp_path: Path) -> None:
    words = [verb, f"data.path={tiny_data}", "init_from=random", *SETTINGS, "train.steps=4", "train.precision=bf16"]
    for run, graphs in (("eager", False), ("graphs", True)):
        assert main([*words, f"out={tmp_path / run}", f"machine.cuda_graphs={graphs}"]) == 0
    torch.testing.assert_close(losses(tmp_path / "graphs"), losses(tmp_path / "eager"), rtol=1e-2, atol=1e-3)
