"""Data sets behind one interface, in an order that is a pure function of (seed, epoch, step)."""

from train.data.augment import AUGMENTATIONS as AUGMENTATIONS
from train.data.batches import batches as batches
from train.data.load import load as load
from train.data.sets import Batch as Batch
from train.data.sets import Dataset as Dataset
from train.data.sets import Split as Split
from train.data.texts import WINDOW as WINDOW
