"Image degradation: seeds, order, ranges, and masks refused"
import cv2, numpy as np, pytest
from deepfid.core import DeepfidError
from deepfid.data.degrade import Degrade, apply_steps, blur, describe_steps, jpeg, resize


@pytest.fixture(scope='module')
def image():
    "Texture at all scales, strongly coloured, not square"
    rng = np.random.default_rng(0)
    x = sum(cv2.resize(rng.normal(0, 20, (n, n, 3)), (150, 120), interpolation=cv2.INTER_CUBIC) for n in (4, 12, 40, 120))
    return np.clip(x+(170, 110, 60), 0, 255).astype(np.uint8)


def change(a, b): return np.abs(a.astype(int)-b).mean()


@pytest.mark.parametrize('op', [lambda i: jpeg(i, 30), lambda i: blur(i, .8), lambda i: resize(i, 50), lambda i: Degrade(p=1, seed=0)(i)])
def test_shape_dtype_and_input_kept(image, op):
    before = image.copy()
    out = op(image)
    assert out.shape == image.shape and out.dtype == np.uint8 and out.flags.c_contiguous
    assert np.array_equal(image, before) and not np.shares_memory(out, image) and change(out, image) > .5


def test_more_is_more(image):
    assert change(jpeg(image, 5), image) > change(jpeg(image, 40), image) > change(jpeg(image, 95), image)
    assert change(blur(image, 2.), image) > change(blur(image, .6), image)
    assert change(resize(image, 30), image) > change(resize(image, 90), image)


def test_identity_settings_change_nothing(image):
    for out in (blur(image, 0), resize(image, 120), apply_steps(image, []), Degrade(p=0)(image)):
        assert np.array_equal(out, image) and not np.shares_memory(out, image)


def test_jpeg_keeps_red_red(image):
    "BGR handed to the encoder would cost more on a strongly coloured image than RGB swapped"
    red = np.zeros((64, 64, 3), np.uint8); red[:] = 220, 30, 20
    assert change(jpeg(red, 90), red) < 3


def test_same_seed_same_sequence(image):
    a, b, c = Degrade(seed=5), Degrade(seed=5), Degrade(seed=6)
    sequences = []
    for _ in range(8):
        assert np.array_equal(a(image), b(image)) and a.last_steps == b.last_steps
        sequences.append((a.last_steps, c.sample_steps()))
    assert any(x != y for x, y in sequences)


def test_own_generator_leaves_the_sequence_alone(image):
    a, b = Degrade(seed=5), Degrade(seed=5)
    first = a(image, np.random.default_rng((3, 14)))
    assert np.array_equal(first, b(image, np.random.default_rng((3, 14))))
    assert a.sample_steps() == Degrade(seed=5).sample_steps()


def test_steps_can_be_applied_again(image):
    d = Degrade(p=1, seed=2)
    assert np.array_equal(d(image), apply_steps(image, d.last_steps)) and d.describe() == describe_steps(d.last_steps)


def test_order_and_choice_are_random():
    d = Degrade(seed=0)
    sampled = [d.sample_steps() for _ in range(2000)]
    assert len({tuple(op for op, _ in s) for s in sampled}) == 16
    assert np.mean([not s for s in sampled]) == pytest.approx(1/8, abs=.03)
    downs = [s['down'] for r in sampled for op, s in r if op == 'resize']
    assert np.mean([x == 'nearest' for x in downs]) == pytest.approx(.5, abs=.06)      # the release was always nearest
    d = Degrade(order=('blur', 'jpeg'), p=1)
    assert [op for op, _ in d.sample_steps()] == ['blur', 'jpeg']


def test_ranges_reach_both_ends():
    d = Degrade(p=1, quality=(10, 12), side=(100, 101), seed=0)
    sampled = [dict(d.sample_steps()) for _ in range(200)]
    assert {r['jpeg']['quality'] for r in sampled} == {10, 11, 12}
    assert {r['resize']['fraction'] for r in sampled} == {100/299, 101/299}
    sigmas = [dict(Degrade(p=1, seed=i).sample_steps())['blur']['sigma'] for i in range(100)]
    assert .1 <= min(sigmas) < .25 and .85 < max(sigmas) <= 1


@pytest.mark.parametrize('size', [112, 299, 320])
def test_side_scales_with_the_image(size):
    "The small image is a third of the side, whatever the side: it never enlarges"
    rng = np.random.default_rng(0)
    im = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    out = apply_steps(im, [('resize', dict(fraction=100/299, down='nearest', up='nearest'))])
    assert len(np.unique(out.reshape(-1, 3), axis=0)) <= round(size*100/299)**2


def test_tiny_images():
    for shape in ((1, 1, 3), (3, 40, 3)):
        im = np.full(shape, 90, np.uint8)
        for s in range(10): assert Degrade(p=1, seed=s)(im).shape == shape


def test_nearest_does_not_shift_the_image():
    "OpenCV's plain nearest shifts it by a pixel at a third of the size"
    x = np.zeros((99, 99, 3), np.uint8); x[49, 49] = 255
    out = cv2.GaussianBlur(x, (0, 0), 6).astype(float); out = (out*255/out.max()).astype(np.uint8)
    r = resize(out, 33, 'nearest', 'bilinear')[..., 0].astype(float)
    yy, xx = np.mgrid[:99, :99]
    assert (r*yy).sum()/r.sum() == pytest.approx(49, abs=.05) and (r*xx).sum()/r.sum() == pytest.approx(49, abs=.05)


@pytest.mark.parametrize('op', [lambda i: jpeg(i, 30), lambda i: blur(i, .8), lambda i: resize(i, 2), Degrade(seed=0), Degrade(p=0), lambda i: apply_steps(i, [])])
@pytest.mark.parametrize('bad', [np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8),
                                 np.zeros((0, 8, 3), np.uint8), 'face.jpg', None])
def test_only_images(op, bad):
    with pytest.raises(DeepfidError, match='^image: give an RGB image') as e: op(bad)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('call, message', [
    (lambda i: jpeg(i, 0), 'quality=0'), (lambda i: jpeg(i, 101), 'quality=101'), (lambda i: blur(i, -1), 'sigma=-1'), (lambda i: blur(i, float('nan')), 'sigma=nan'),
    (lambda i: resize(i, 0), 'side=0'), (lambda i: resize(i, 121), 'side=121'), (lambda i: resize(i, 50, 'lanczos'), "'lanczos'"),
    (lambda i: Degrade(p=1.5), 'p=1.5'), (lambda i: Degrade(quality=(0, 99)), 'quality'), (lambda i: Degrade(quality=(50, 20)), 'quality'), (lambda i: Degrade(side=(100, 300)), 'side'),
    (lambda i: Degrade(sigma=.5), 'sigma'), (lambda i: Degrade(order=('jpeg', 'noise')), "'noise'"), (lambda i: Degrade(interpolation=('cubic',)), "'cubic'"),
    (lambda i: Degrade(interpolation=()), 'interpolation'), (lambda i: apply_steps(i, [('noise', {})]), "'noise'"),
])
def test_bad_settings(image, call, message):
    with pytest.raises(DeepfidError, match=message): call(image)
