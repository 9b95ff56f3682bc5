"""Published peaks of accelerators: what a share of peak is a share of."""

# Dense matrix products in TFLOP/s, from the vendors' data sheets: bf16, for V100 fp16. More
# specific names stand before those that they contain.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.4,
    "H100": 989.4,
    "A100": 312.0,
    "V100": 125.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the 16-bit peak in TFLOP/s of a device by the name that CUDA gives it.

    None for a device that is not in the table. fp8 is reported against the same peak.
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
