"""Predictive, entropy-thresholded, partitioned sparse gradient exchange as an optax transformation."""

from gradpart_jax import baselines as baselines
from gradpart_jax import recipes as recipes
from gradpart_jax._version import __version__ as __version__
from gradpart_jax.compressors import STATIC_ARGS as STATIC_ARGS
from gradpart_jax.compressors import dense_mean as dense_mean
from gradpart_jax.compressors import inspect as inspect
from gradpart_jax.compressors import partition_compress as partition_compress
from gradpart_jax.costs import Calibration as Calibration
from gradpart_jax.families import FAMILIES as FAMILIES
from gradpart_jax.local_steps import local as local
from gradpart_jax.local_steps import local_updates as local_updates
from gradpart_jax.placement import state_specs as state_specs
from gradpart_jax.planner import StepPlan as StepPlan
from gradpart_jax.planner import plan as plan
from gradpart_jax.regions import ENTROPY_RULES as ENTROPY_RULES
from gradpart_jax.replicas import agreed as agreed
from gradpart_jax.replicas import apply_updates as apply_updates
from gradpart_jax.replicas import params_axis as params_axis
from gradpart_jax.scheme import Scheme as Scheme
from gradpart_jax.segments import segment_names as segment_names
from gradpart_jax.transform import CompressState as CompressState
from gradpart_jax.transform import Stats as Stats
from gradpart_jax.transform import compress as compress
from gradpart_jax.transform import state_axes as state_axes
from gradpart_jax.transform import stats as stats
