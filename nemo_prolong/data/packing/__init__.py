"""Documents to rows of exactly ``seq_length`` tokens: which piece of which document lies where, from lengths alone."""

from nemo_prolong.data.packing.binning import best_fit
from nemo_prolong.data.packing.consecutive import concat, intact
from nemo_prolong.data.packing.cutting import split
from nemo_prolong.data.packing.gathering import copy_pieces, gather
from nemo_prolong.data.packing.layout import Layout
from nemo_prolong.data.packing.targets import NO_TARGET, DocumentTargets

__all__ = ["NO_TARGET", "DocumentTargets", "Layout", "best_fit", "concat", "copy_pieces", "gather", "intact", "split"]
