"""Curvature of the training loss: the classifier's block in closed form, any other by autograd.

Every matrix here is a `SymmetricOperator`: something with a shape that is applied with ``@``.
Eigenvalues come with their residuals (`Eigen`), estimates with their standard errors.
"""

from pof.hessian.block import BlockCurvature, UnknownBlock, block_gauss_newton, block_hessian
from pof.hessian.classifier import ClassifierHessian, classifier_hessian
from pof.hessian.eigen import Eigen, extreme_eigenvalues, top_eigenvalues
from pof.hessian.features import FeatureCache, cache_features
from pof.hessian.operator import SymmetricOperator
from pof.hessian.samples import ImageBatches, sample_hash
from pof.hessian.stochastic import SpectralDensity, TraceEstimate, spectral_density, trace

__all__ = [
    "BlockCurvature",
    "ClassifierHessian",
    "Eigen",
    "FeatureCache",
    "ImageBatches",
    "SpectralDensity",
    "SymmetricOperator",
    "TraceEstimate",
    "UnknownBlock",
    "block_gauss_newton",
    "block_hessian",
    "cache_features",
    "classifier_hessian",
    "extreme_eigenvalues",
    "sample_hash",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
