"Quality: NIQE and the mapping to fidelity, what does not fit a notebook cell"
import json
import cv2, numpy as np, pytest
from safetensors.numpy import save
from scipy.stats import spearmanr
from deepfid.core import DeepfidError, Face, ImageError, WeightsError
from deepfid.quality.mapping import FidelityMapping
from deepfid.quality.niqe import NIQE, aggd_fit, load_niqe, luma, mscn, neighbour_product, niqe_features, patch_sums


def scene(seed, size=112):
    "A picture with edges, shading and grain"
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.normal(0, 1, (size, size, 3)), (0, 0), s)*s*a for s, a in ((16, 90), (5, 45), (1.5, 20), (.7, 12))]
    return np.clip(128 + sum(layers) + np.where(layers[1] > 6, 25, 0) + rng.normal(0, 1.5, (size, size, 1)), 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def scenes(): return [scene(i) for i in range(60)]

@pytest.fixture(scope='module')
def niqe(scenes): return NIQE().fit(scenes[:40])


# -- the parts --
def test_patch_sums_are_sums_of_patches():
    x = np.random.default_rng(0).normal(size=(2, 60, 75)).astype(np.float32)
    got = patch_sums(x, 20, 10)
    assert got.shape == (2, 5, 6)
    for y in range(5):
        for c in range(6): np.testing.assert_allclose(got[:, y, c], x[:, 10*y:10*y + 20, 10*c:10*c + 20].sum((1, 2)), atol=1e-4)


@pytest.mark.parametrize('step', [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_neighbour_product(step):
    x = np.random.default_rng(0).normal(size=(5, 7))
    (dy, dx), out = step, neighbour_product(x, step)
    for y in range(5):
        for c in range(7):
            inside = y + dy < 5 and 0 <= c + dx < 7
            assert out[y, c] == (x[y, c]*x[y + dy, c + dx] if inside else 0)


@pytest.mark.parametrize('shape', [.6, 1, 2, 4])
def test_aggd_fit_recovers_shape_and_widths(shape):
    rng = np.random.default_rng(0)
    size = rng.gamma(1/shape, size=(600, 600))**(1/shape)
    right = rng.random(size.shape) < 2/3
    a, l, r = aggd_fit(np.where(right, 2*size, -size))
    assert abs(a/shape - 1) < .05 and abs(r/l - 2) < .05


def test_mscn_of_a_flat_picture_is_zero():
    m, deviation = mscn(np.full((30, 40), 201, np.float32))
    assert np.abs(m).max() < 1e-3 and deviation.max() < .1


def test_features_do_not_depend_on_the_batch(scenes):
    greys = np.stack([luma(s) for s in scenes[:5]])
    together, _ = niqe_features(greys)
    alone = np.concatenate([niqe_features(g[None])[0] for g in greys])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (5, 9, 36) and np.isfinite(together).all()


# -- NIQE --
def test_score_falls_with_damage(niqe, scenes):
    test = scenes[40:]
    blur = [[cv2.GaussianBlur(s, (0, 0), v) if v else s for s in test] for v in (0, .8, 1.5, 3)]
    jpeg = [[cv2.imdecode(cv2.imencode('.jpg', s, [cv2.IMWRITE_JPEG_QUALITY, v])[1], 1) for s in test] for v in (95, 40, 10)]
    for ladder in (blur, jpeg):
        scores = np.array([niqe.score(x) for x in ladder])
        assert spearmanr(np.repeat(range(len(ladder)), len(test)), scores.ravel())[0] < -.6


def test_score_equals_the_formula(niqe, scenes):
    f = niqe_features(luma(scenes[50])[None])[0][0]
    d = f.mean(0) - niqe.mean
    want = -np.sqrt(d@np.linalg.pinv((niqe.cov + np.cov(f.T))/2)@d)
    assert niqe.score(scenes[50]) == pytest.approx(want, rel=1e-6)


def test_score_takes_every_form_of_picture(niqe, scenes):
    s = scenes[41]
    a = niqe.score(s)
    assert np.ndim(a) == 0 and a < 0
    for other in (Face(s), s/255.): assert niqe.score(other) == pytest.approx(a, rel=1e-3)
    many = niqe.score(np.stack(scenes[41:44]))
    assert many.shape == (3,) and many.dtype == np.float64 and many[0] == pytest.approx(a, rel=1e-6)
    assert niqe.score([]).shape == (0,)
    assert niqe.score(x for x in scenes[41:43]).shape == (2,)
    grey = luma(s).astype(np.uint8)
    assert niqe.score(grey) == pytest.approx(niqe.score(grey[..., None]), rel=1e-9)


def test_score_keeps_the_order_of_mixed_sizes(niqe, scenes):
    mixed = [scenes[40], scene(1, 150), scenes[41], scene(2, 150), scene(3, 61)]
    np.testing.assert_allclose(niqe.score(mixed), [niqe.score(s) for s in mixed], rtol=1e-5)


def test_odd_pictures_have_finite_scores(niqe, scenes):
    flat = [np.full((112, 112, 3), v, np.uint8) for v in (0, 90, 255)]
    odd = niqe.score([*flat, scenes[40][:56, :56], scenes[40][:70, :56]])
    assert np.isfinite(odd).all() and (odd[:3] < niqe.score(scenes[40:]).min()).all()


@pytest.mark.parametrize('image, says', [
    (np.full((112, 112), np.nan), 'NaN'), (np.full((112, 112), 1.5), 'divide by 255'), (np.zeros((40, 112), np.uint8), 'smaller'),
    (np.zeros((1, 1, 3), np.uint8), 'smaller'), (np.zeros((112, 112), np.int64), 'uint8'), (np.zeros((0, 5, 3), np.uint8), 'shape'),
    (np.zeros((112, 112, 4), np.uint8), 'shape')])
def test_pictures_that_cannot_be_scored(niqe, image, says):
    with pytest.raises(ImageError, match=says) as e: niqe.score([image])
    assert '\n' not in str(e.value)


def test_bad_options_and_bad_fits():
    for patch, step in ((56, 27), (56, 40), (56, 0)):
        with pytest.raises(DeepfidError, match='even and divide'): NIQE(patch, step)
    with pytest.raises(DeepfidError, match='not fitted'): NIQE().score(scene(0))
    with pytest.raises(DeepfidError, match='sharp patches'): NIQE().fit([])
    with pytest.raises(DeepfidError, match='sharp patches'): NIQE().fit([np.full((112, 112), 7, np.uint8)]*60)


def test_files(niqe, scenes, tmp_path):
    path = niqe.save(tmp_path/'a.safetensors')
    again = NIQE.load(path)
    assert (again.score(scenes[40:]) == niqe.score(scenes[40:])).all() and again.about == niqe.about
    assert path.read_bytes() == again.save(tmp_path/'b.safetensors').read_bytes()
    whole = path.read_bytes()
    for name, content in dict(empty=b'', cut=whole[:200], short=whole[:-8], flipped=whole[:-1] + bytes([whole[-1] ^ 1]),
                              other=save(dict(mean=np.zeros(36))), text=b'hello').items():
        bad = tmp_path/f'{name}.safetensors'
        bad.write_bytes(content)
        with pytest.raises(WeightsError, match=name): NIQE.load(bad)
    bad.write_bytes(save(dict(mean=np.zeros(3), cov=np.zeros((3, 3))), metadata=dict(niqe=json.dumps(dict(sha256='')))))
    with pytest.raises(WeightsError, match='shapes'): NIQE.load(bad)
    with pytest.raises(WeightsError, match='no such file'): NIQE.load(tmp_path/'none.safetensors')
    with pytest.raises(WeightsError, match='moon'): load_niqe('moon')


def test_the_packaged_fit():
    from deepfid.data import degrade
    from deepfid.quality.niqe import pristine
    niqe, faces = load_niqe('synth'), [pristine(500 + i, 112) for i in range(8)]
    good, bad = niqe.score(faces), niqe.score([degrade.blur(f, 2) for f in faces])
    assert (good > bad).all() and niqe.about['images'] >= 100


# -- the mapping --
@pytest.mark.parametrize('method', ['minmax', 'rank'])
class TestMapping:
    def test_bands_order_and_gap(self, method):
        rng = np.random.default_rng(0)
        q, real = rng.normal(size=400), rng.random(400) < .5
        f = FidelityMapping(method).fit_transform(q, real)
        assert 0 <= f[~real].min() < f[~real].max() <= .4 + 1e-12 and .6 - 1e-12 <= f[real].min() < f[real].max() <= 1
        for k in (True, False): assert spearmanr(q[real == k], f[real == k])[0] == pytest.approx(1)

    def test_order_of_rows_does_not_matter(self, method):
        rng = np.random.default_rng(0)
        q, real = rng.normal(size=50).round(1), np.arange(50) % 2
        p = rng.permutation(50)
        m = FidelityMapping(method)
        np.testing.assert_array_equal(m.fit_transform(q, real)[p], m.fit_transform(q[p], real[p]))

    def test_equal_and_single(self, method):
        m = FidelityMapping(method)
        np.testing.assert_allclose(m.fit_transform([2, 2, 2], [1, 0, 0]), [.8, .2, .2])

    def test_beyond_what_was_fitted(self, method):
        m = FidelityMapping(method).fit([0, 1, 2, 3], [0, 0, 1, 1])
        np.testing.assert_array_equal(m.transform([-9, 9, -9, 9], [0, 0, 1, 1]), m.transform([0, 1, 2, 3], [0, 0, 1, 1]))

    def test_json(self, method):
        m = FidelityMapping(method, bands=((0, .3), (.5, .9))).fit(np.linspace(0, 1, 30)**2, np.arange(30) % 2)
        again = FidelityMapping.from_dict(json.loads(json.dumps(m.to_dict())))
        q = np.linspace(-1, 2, 77)
        np.testing.assert_array_equal(m.transform(q, True), again.transform(q, True))
        assert again.get_params() == m.get_params() or json.dumps(again.get_params()) == json.dumps(m.get_params())

    @pytest.mark.parametrize('q, real, says', [
        ([], [], 'no qualities'), ([1, np.nan, np.nan], [1, 0, 0], '2 of 3'), ([1, np.inf], [1, 0], '1 of 2'), (['a', 'b'], [1, 0], 'not a number'),
        ([1, 2], ['real', 'fake'], "'real'"), ([1, 2], [1, 2], '1 of 2'), ([1, 2], [1, np.nan], 'nan'), ([1, 2], [None, 0], 'None'), ([1, 2], [1, 0, 1], '3 labels for 2')])
    def test_bad_input(self, method, q, real, says):
        with pytest.raises(DeepfidError, match=says) as e: FidelityMapping(method).fit(q, real)
        assert '\n' not in str(e.value)

    def test_one_class(self, method):
        m = FidelityMapping(method).fit([1, 2, 3], True)
        assert m.transform(2, True) == pytest.approx(.8)
        with pytest.raises(DeepfidError, match='without fake'): m.transform([1, 2], [1, 0])

    def test_a_refused_fit_leaves_the_old_one(self, method):
        m = FidelityMapping(method).fit([1, 2, 3, 4], [0, 0, 1, 1])
        with pytest.raises(DeepfidError): m.fit([np.nan], [1])
        assert m.transform(1, 0) == m.transform(0, 0)


def test_an_outlier_moves_ranks_by_one_place_only():
    q, real = np.r_[np.linspace(0, 1, 100), np.linspace(0, 1, 100)], np.r_[np.ones(100), np.zeros(100)]
    far_q, far_real = np.r_[q, -1e6], np.r_[real, 1]
    shift = {m: np.abs(FidelityMapping(m).fit(far_q, far_real).transform(q, real) - FidelityMapping(m).fit_transform(q, real)).max() for m in ('minmax', 'rank')}
    assert shift['rank'] < .4/100 + 1e-9 and shift['minmax'] > .39


@pytest.mark.parametrize('change, says', [
    (dict(method='x'), 'unknown'), (dict(bands=((0, .4),)), 'two pairs'), (dict(bands=((.5, .4), (.6, 1))), 'two pairs'),
    (dict(bands=((0, np.nan), (.6, 1))), 'two pairs'), (dict(bands='wide'), 'two pairs')])
def test_bad_options(change, says):
    with pytest.raises(DeepfidError, match=says): FidelityMapping(**change).fit([1, 2], [0, 1])


@pytest.mark.parametrize('change', [dict(knots=dict(real=[[1, 0], [0, 1]])), dict(knots=dict(other=[[1], [1]])), dict(knots=dict(real=[[1, 2], [0]])),
                                    dict(knots=[]), dict(knots=dict(real=[[0, None], [0, 1]])), dict(bands=3)])
def test_bad_state(change):
    state = FidelityMapping().fit([1, 2], [0, 1]).to_dict()
    with pytest.raises(DeepfidError, match='not the state'): FidelityMapping.from_dict({**state, **change})
    with pytest.raises(DeepfidError, match='not the state'): FidelityMapping.from_dict(None)
