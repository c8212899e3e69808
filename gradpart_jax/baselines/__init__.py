"""What a user would otherwise pick, each a Scheme for `gp.compress`."""

from gradpart_jax.baselines.demo import demo as demo
from gradpart_jax.baselines.dense import dense as dense
from gradpart_jax.baselines.dgc import dgc as dgc
from gradpart_jax.baselines.ef_signsgd import ef_signsgd as ef_signsgd
from gradpart_jax.baselines.egc import egc as egc
from gradpart_jax.baselines.gaussiank import gaussiank as gaussiank
from gradpart_jax.baselines.int8 import int8 as int8
from gradpart_jax.baselines.lgc import lgc as lgc
from gradpart_jax.baselines.natural import natural as natural
from gradpart_jax.baselines.oktopk import oktopk as oktopk
from gradpart_jax.baselines.onebit_sgd import onebit_sgd as onebit_sgd
from gradpart_jax.baselines.powersgd import powersgd as powersgd
from gradpart_jax.baselines.qsgd import qsgd as qsgd
from gradpart_jax.baselines.randomk import randomk as randomk
from gradpart_jax.baselines.redsync import redsync as redsync
from gradpart_jax.baselines.scalecom import scalecom as scalecom
from gradpart_jax.baselines.sidco import sidco as sidco
from gradpart_jax.baselines.signsgd import signsgd as signsgd
from gradpart_jax.baselines.terngrad import terngrad as terngrad
from gradpart_jax.baselines.threshold import threshold as threshold
from gradpart_jax.baselines.topk import topk as topk
