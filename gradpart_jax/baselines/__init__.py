"""What a user would otherwise pick, each a Scheme for `gp.compress`."""

from gradpart_jax.baselines.dense import dense as dense
from gradpart_jax.baselines.dgc import dgc as dgc
from gradpart_jax.baselines.egc import egc as egc
from gradpart_jax.baselines.gaussiank import gaussiank as gaussiank
from gradpart_jax.baselines.lgc import lgc as lgc
from gradpart_jax.baselines.oktopk import oktopk as oktopk
from gradpart_jax.baselines.randomk import randomk as randomk
from gradpart_jax.baselines.redsync import redsync as redsync
from gradpart_jax.baselines.scalecom import scalecom as scalecom
from gradpart_jax.baselines.sidco import sidco as sidco
from gradpart_jax.baselines.threshold import threshold as threshold
from gradpart_jax.baselines.topk import topk as topk
