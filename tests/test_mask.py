"Ground-truth masks: DIFF and SSIM, their traps, and bad input"
import cv2, numpy as np, pytest
from deepfid.core import DeepfidError
from deepfid.data.mask import diff_mask, ssim_map, ssim_mask


@pytest.fixture
def pair():
    "A textured image, and a copy whose middle is other texture (the known forged square)"
    rng = np.random.default_rng(0)
    real = cv2.GaussianBlur(rng.integers(0, 256, (80, 90, 3)).astype(np.uint8), (0, 0), 1.)
    fake = real.copy()
    fake[25:55, 30:60] = cv2.GaussianBlur(rng.integers(0, 256, (30, 30, 3)).astype(np.uint8), (0, 0), 1.)
    return real, fake


def test_real_against_itself_is_empty(pair):
    for maker in (diff_mask, ssim_mask): assert maker(pair[0], pair[0]).sum() == 0
    assert np.abs(ssim_map(pair[0], pair[0])).max() < 1e-6


@pytest.mark.parametrize('maker', [diff_mask, ssim_mask])
def test_marks_the_square_and_nothing_far_from_it(pair, maker):
    mask = maker(*pair)
    assert mask.shape == (80, 90) and mask.dtype == np.float32 and set(np.unique(mask)) <= {0, 1}
    assert mask[28:52, 33:57].mean() > .4
    far = np.ones((80, 90), bool); far[21:59, 26:64] = False
    assert mask[far].sum() == 0
    assert np.array_equal(mask, maker(pair[1], pair[0]))


def test_difference_of_one_level_does_not_wrap():
    a, b = np.full((16, 16, 3), 10, np.uint8), np.full((16, 16, 3), 11, np.uint8)
    assert diff_mask(a, b).sum() == 0 and diff_mask(b, a).sum() == 0


def test_diff_threshold_is_a_share_of_the_range():
    a, b = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 30, np.uint8)
    assert diff_mask(a, b, .1).mean() == 1 and diff_mask(a, b, .12).mean() == 0


def test_reversed_structure_stays_marked(pair):
    "S < 0 there: a byte cast would wrap to 'hardly changed'"
    d = ssim_map(pair[0], 255-pair[0])
    assert d.max() == 1 and d.min() >= 0
    assert ssim_mask(pair[0], 255-pair[0]).mean() > .95


def test_ssim_equals_the_definition(pair):
    "One window worked out by hand, on each channel"
    a, b = (p[20:27, 28:35].reshape(49, 3).astype(float) for p in pair)
    c1, c2, s = 2.55**2, 7.65**2, []
    for x, y in zip(a.T, b.T):
        c = np.cov(x, y)
        s.append((2*x.mean()*y.mean()+c1)*(2*c[0, 1]+c2)/((x.mean()**2+y.mean()**2+c1)*(c[0, 0]+c[1, 1]+c2)))
    assert ssim_map(*pair)[23, 31] == pytest.approx(1-np.mean(s), abs=1e-6)


@pytest.mark.parametrize('window', [3, 7, 11])
def test_ssim_equals_skimage(pair, window):
    metrics = pytest.importorskip('skimage.metrics')
    _, s = metrics.structural_similarity(*pair, channel_axis=2, full=True, data_range=255, win_size=window)
    assert np.abs(ssim_map(*pair, window=window) - np.clip(1-s.mean(2), 0, 1)).max() < 1e-6


def test_one_pixel_of_shift_ruins_the_mask(pair):
    assert ssim_mask(pair[0], np.roll(pair[0], 1, axis=1))[:, 10:].mean() > .8


@pytest.mark.parametrize('maker', [diff_mask, ssim_mask, ssim_map])
@pytest.mark.parametrize('real, fake, message', [
    (np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8, 3), np.uint8), 'one matrix'),
    (np.zeros((9, 9, 3), np.float32), np.zeros((9, 9, 3), np.uint8), 'real: .*float32'),
    (np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8), 'fake: .*uint8 .9, 9.'),
    (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 4), np.uint8), 'RGB'),
    (np.zeros((0, 9, 3), np.uint8), np.zeros((0, 9, 3), np.uint8), 'RGB'),
    ('real.jpg', np.zeros((9, 9, 3), np.uint8), 'real: .*not str'),
])
def test_bad_pairs(maker, real, fake, message):
    with pytest.raises(DeepfidError, match=message) as e: maker(real, fake)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('window', [1, 2, 6, 13])
def test_bad_windows(window):
    with pytest.raises(DeepfidError, match='window'): ssim_map(*[np.zeros((9, 9, 3), np.uint8)]*2, window=window)
