"""What a user would otherwise pick, each a Scheme for `gp.compress`."""

from gradpart_jax.baselines.dense import dense as dense
from gradpart_jax.baselines.randomk import randomk as randomk
from gradpart_jax.baselines.topk import topk as topk
