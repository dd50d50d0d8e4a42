"""Data sets: where their bytes come from, and what they are.

`load` finds a data set, or fetches it, holds it against its official checksums and returns it as
uint8 tensors; `DATASETS` says what there is.
"""

from pof.data.catalogue import DATASETS, DatasetInfo
from pof.data.dataset import Dataset, Split
from pof.data.loading import load

__all__ = ["DATASETS", "Dataset", "DatasetInfo", "Split", "load"]
