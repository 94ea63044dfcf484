"""Cross entropy for MXNet 1.x Gluon that is accurate for probabilities near 0 and near 1."""

try:
    import mxnet as _mxnet
except ImportError as error:
    raise ImportError(
        'gluon_stable_ce needs MXNet 1.6 to 1.9: '
        'pip install -e ".[cpu]" in the clone, or a CUDA wheel of MXNet'
    ) from error
except AttributeError as error:  # MXNet 1.x reads np.bool, which NumPy 1.24 removed
    raise ImportError(
        'MXNet 1.x cannot be imported with NumPy 1.24 or later: pip install "numpy<1.24"'
    ) from error

if not _mxnet.__version__.startswith('1.'):
    raise ImportError(f'gluon_stable_ce needs MXNet 1.6 to 1.9, this is {_mxnet.__version__}')

from .auditing import Audit, audit
from .loss import StableSoftmaxCELoss, StableSoftmaxCrossEntropyLoss
from .metric import StableBitsPerToken, StableCrossEntropy, StableLoss, StablePerplexity
from .patching import patch, unpatch
from .version import __version__

__all__ = [
    'Audit',
    'StableBitsPerToken',
    'StableCrossEntropy',
    'StableLoss',
    'StablePerplexity',
    'StableSoftmaxCELoss',
    'StableSoftmaxCrossEntropyLoss',
    '__version__',
    'audit',
    'patch',
    'unpatch',
]
