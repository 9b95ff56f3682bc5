"""Kernels by kind, and what communication no computation hides."""

import gzip
import json
from pathlib import Path

import pytest

from hydratron.perf.devices import peak_tflops
from hydratron.perf.trace import Kernel, breakdown, read_trace

NAMES = {
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix_products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64": "matrix_products",
    "triton_tem_fused_mm_12": "matrix_products",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "attention",
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "communication",
    "triton_poi_fused__scaled_mm__to_copy_clamp_div_t_3": "other_kernels",
    "triton_per_fused_native_dropout_native_layer_norm_7": "other_kernels",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "other_kernels",
    "Memcpy HtoD (Pinned -> Device)": "other_kernels",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert Kernel(name, 0, 1).kind == kind


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    kernels = [
        Kernel("gemm", 0, 1000),
        Kernel("ncclDevKernel_AllGather", 500, 2000),  # 1000 alone
        Kernel("flash_fwd", 2500, 3000),  # after 500 of nothing
        Kernel("triton_poi_fused", 2900, 3200),  # beside attention for 100
    ]
    assert breakdown(kernels, num_steps=2) == {
        "communication": 0.75,
        "other_kernels": 0.15,
        "attention": 0.25,
        "matrix_products": 0.5,
        "exposed_communication": 0.5,
        "idle": 0.25,
    }
    assert breakdown([], num_steps=2) == {}


def test_a_trace_file_gives_the_device_s_work_alone(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10.5, "dur": 2.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy", "ts": 20.0, "dur": 1.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0, "dur": 5.0},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert read_trace(path) == [Kernel("gemm", 10.5, 12.5), Kernel("Memcpy", 20.0, 21.0)]


def test_the_more_specific_device_name_decides() -> None:
    assert peak_tflops("NVIDIA H200") == 989.4
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-40GB") == 312.0
    assert peak_tflops("CPU") is None
