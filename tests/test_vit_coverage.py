"""Every name that timm lists in its modules vision_transformer and deit, built small, against timm's own modules."""

import timm
import pytest
import torch
from timm.models import vision_transformer, deit

import smi_fast
from timm.models.vision_transformer import ParallelThingsBlock
