"""The ablations: a channel that attention does not see, variants that train on what they say."""
import torch

from hashfast.research.ablations import Layer
from hashfast.research.training import attention_weights


def test_value_norms_are_a_channel_that_attention_does_not_see() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 20, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    wide = Layer([q], [k], [v]).with_value_norms()
    torch.testing.assert_close(wide.keys[0][..., 16], v.norm(dim=-1).log())
    positions = torch.tensor([5, 19])
    torch.testing.assert_close(attention_weights(wide.queries[0][:, positions], wide.keys[0], positions),
                               attention_weights(q[:, positions], k, positions))
