"""What follows a product in several kernels of linear layers."""
import triton
import triton.language as tl


@triton.jit
def silu_gate(gate, up):
    return gate / (1 + tl.exp(-gate)) * up
