"""Thresholds by layer and of the last block: what they keep, and the multiples that errors give."""

from itertools import product

import pytest
import torch

import stem
from stem import hf
from stem.experiments.long_context.thresholds import LAST, MULTIPLES, Thresholds, by_layer, calibrated
from stem.planning import select

CONFIG = stem.StemConfig.preset("adaptive", block_size=16, threshold=0.1, dense_up_to=0, dropped="cells")


def test_a_layer_takes_its_multiple_of_the_threshold():
    first, second = Thresholds((0.5, 20.0)).attention(CONFIG, 2)
    assert first == CONFIG.replace(threshold=0.05) and second == CONFIG.replace(threshold=1.0)
    assert Thresholds().attention(CONFIG, 3) == [CONFIG] * 3


@pytest.mark.parametrize("told", ["", "last=0.25", "layers=0.5,20", "last=0.25 layers=1,2.5"])
def test_words_name_the_multiples(told):
    assert str(Thresholds.parse(told)) == told


@pytest.mark.parametrize("told", ["0.25", "last=x", "first=1", "layers=1,,a"])
def test_other_words_are_refused(told):
    with pytest.raises(ValueError, match="thresholds must read"):
        Thresholds.parse(told)


def test_only_the_last_block_takes_its_own_threshold():
    q, k, v = (torch.randn(1, heads, 256, 16, generator=torch.manual_seed(heads)) for heads in (4, 2, 3))
    v = v[:, :2]
    found = Thresholds((2.0,), last=LAST).attention(CONFIG, 1)[0](q, k, v)
    masks = [select(q, k, v, CONFIG.replace(threshold=t), 0.25, None).to_mask() for t in (0.2, 0.05)]
    assert found.to_mask()[:, :, :-1].equal(masks[0][:, :, :-1]) and found.to_mask()[:, :, -1].equal(masks[1][:, :, -1])
    assert not masks[0][:, :, -1].equal(masks[1][:, :, -1])
    assert (found.dropped, found.q_len, found.kv_len) == ("cells", 256, 256)


@pytest.mark.parametrize("where", [Thresholds(), Thresholds(last=LAST), Thresholds((0.5, 3.0))], ids=str)
def test_the_threshold_of_a_density_is_found_with_the_multiples(model, where):
    layers = model.config.num_hidden_layers
    where = Thresholds(where.layers and (where.layers * layers)[:layers], where.last)
    windows = torch.arange(512).view(2, 256) % 89
    found = calibrated(model, windows, 0.5, CONFIG, where)
    with hf.stem_prefill(model, where.attention(found, layers)) as report:
        for window in windows.split(1):
            model(window)
    assert report.density() == pytest.approx(0.5, rel=0.021)
    with pytest.raises(ValueError, match="density=0.01 was not reached"):
        calibrated(model, windows, 0.01, CONFIG, where)


def test_multiples_have_the_smallest_error_at_the_density():
    """Against every choice of one measured multiple for each layer: none within the density has a smaller error."""
    densities = [[0.4, 0.2, 0.1, 0.05], [0.5, 0.3, 0.15, 0.05], [0.3, 0.12, 0.06, 0.04]]
    errors = [[0.01, 0.02, 0.5, 4.0], [0.001, 0.002, 0.003, 0.004], [0.1, 0.3, 0.9, 1.5]]
    found = by_layer(densities, errors, 0.15)

    def at(layer: int, multiple: float) -> tuple[float, float]:
        place = torch.tensor(multiple / MULTIPLES[0]).log() / torch.tensor(4.0).log()
        low = min(int(place), 2)
        part = float(place) - low
        kept = densities[layer][low] * (1 - part) + densities[layer][low + 1] * part
        return kept, errors[layer][low] ** (1 - part) * errors[layer][low + 1] ** part

    kept, error = (sum(of) for of in zip(*(at(i, x) for i, x in enumerate(found.layers)), strict=True))
    assert 0.14 * 3 < kept <= 0.1505 * 3
    for of in product(range(4), repeat=3):
        if sum(densities[i][j] for i, j in enumerate(of)) <= kept:
            assert sum(errors[i][j] for i, j in enumerate(of)) >= error - 1e-6
    assert found.layers[1] > found.layers[2] > 0  # the layer without errors keeps least


def test_names_of_thresholds():
    told = [str(of) for of in (Thresholds(), Thresholds(last=0.25), Thresholds((1.0, 0.5)), Thresholds((2.0,), 0.25))]
    assert told == ["", "last=0.25", "layers=1,0.5", "last=0.25 layers=2"]
