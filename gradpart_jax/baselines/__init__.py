"""What a user would otherwise pick, each a Scheme for `gp.compress`."""

from gradpart_jax.baselines.dense import dense as dense
