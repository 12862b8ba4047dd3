"""The laboratory's methods. Importing this makes their names known to recipes; torch is not imported.

To add one: a class of options in `options.py`, a TrainingMethod in a file of its own, and a line below.
"""

from relora.lab.methods.options import (
    AsPublishedOptions,
    ControlOptions,
    GaLoreOptions,
    InPlaceOptions,
    MuonOptions,
    OnlineOptions,
    ScaleOptions,
    SwitchOptions,
)
from relora.train.methods import STEPPED_BY, MethodSpec, register_method

_HERE = "relora.lab.methods"

for _spec in (
    MethodSpec(
        name="full-muon",
        warm_start="full-muon",
        implementation=f"{_HERE}.muon:FullMuon",
        options=MuonOptions,
        has_switch=False,
        injects=False,
    ),
    MethodSpec(
        name="muon-in-place",
        warm_start=STEPPED_BY["muon"],
        implementation=f"{_HERE}.muon_in_place:MuonInPlace",
        options=InPlaceOptions,
        has_switch=False,
        injects=False,
    ),
    MethodSpec(
        name="full-scale",
        warm_start="full-scale",
        implementation=f"{_HERE}.scale:FullScale",
        options=ScaleOptions,
        has_switch=False,
        injects=False,
    ),
    MethodSpec(
        name="control",
        warm_start="control",
        implementation=f"{_HERE}.control:Control",
        options=ControlOptions,
        has_switch=False,
        injects=False,
    ),
    MethodSpec(
        name="galore",
        implementation=f"{_HERE}.galore:GaLore",
        options=GaLoreOptions,
        injects=False,
    ),
    MethodSpec(
        name="relora-online",
        implementation=f"{_HERE}.online:Online",
        options=OnlineOptions,
        restarts=True,
    ),
    MethodSpec(
        name="switchlora",
        implementation=f"{_HERE}.switchlora:SwitchLoRA",
        options=SwitchOptions,
    ),
    MethodSpec(
        name="relora-as-published",
        implementation=f"{_HERE}.as_published:AsPublished",
        options=AsPublishedOptions,
        restarts=True,
    ),
):
    register_method(_spec)
