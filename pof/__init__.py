"""PoF: Post-Training of Feature Extractor (Sato et al., ICML 2022), with SAM to post-train from.

The package holds the method and what it needs: networks, data on the device, SAM, PoF,
training. It knows nothing of experiments, result files or clusters.
"""
