"Quality measures: NIQE, BRISQUE and SER-FIQ, what does not fit a notebook cell"
import json, subprocess, sys
import cv2, numpy as np, pytest, torch
from safetensors.numpy import save
from scipy.stats import spearmanr
from torch import nn
from deepfid.core import DataMissingError, DeepfidError, Face, ImageError, WeightsError, data_dir
from deepfid.data import degrade
from deepfid.quality import brisque as B
from deepfid.quality.niqe import (NIQE, fit_aggd, load_niqe, mscn_coefficients, neighbour_product, niqe_features, patch_sums, pristine_face,
    rgb_to_luma)
from deepfid.quality.serfiq import (SERFIQ, arcface_loss, embedding_robustness, face_embedder, load_embedder, load_serfiq, relative_cost,
    save_embedder)

def scene(seed, size=112):
    "An image with edges, shading and grain"
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.normal(0, 1, (size, size, 3)), (0, 0), s)*s*a for s, a in ((16, 90), (5, 45), (1.5, 20), (.7, 12))]
    return np.clip(128 + sum(layers) + np.where(layers[1] > 6, 25, 0) + rng.normal(0, 1.5, (size, size, 1)), 0, 255).astype(np.uint8)

@pytest.fixture(scope='module')
def scenes(): return [scene(i) for i in range(50)]

@pytest.fixture(scope='module')
def niqe(scenes): return NIQE().fit(scenes[:40])

faces = [pristine_face(50+i) for i in range(4)]

def test_imports_stay_light():
    code = ('import sys, deepfid.quality.niqe, deepfid.quality.brisque, deepfid.quality.mapping, deepfid.evaluate.metrics, deepfid.evaluate.report; '
        'print(*(m for m in ("scipy", "pandas", "sklearn", "matplotlib", "ipywidgets", "torch", "fastai") if m in sys.modules))')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == []


# -- the parts of NIQE --
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

@pytest.mark.parametrize('shape', [.6, 2, 4])
def test_fit_aggd_recovers_shape_and_widths(shape):
    rng = np.random.default_rng(0)
    size = rng.gamma(1/shape, size=(400, 400))**(1/shape)
    right = rng.random(size.shape) < 2/3
    a, left, r = fit_aggd(np.where(right, 2*size, -size))
    assert abs(a/shape - 1) < .05 and abs(r/left - 2) < .05

def test_mscn_of_a_flat_image_is_zero():
    m, deviation = mscn_coefficients(np.full((30, 40), 201, np.float32))
    assert np.abs(m).max() < 1e-3 and deviation.max() < .1

def test_features_do_not_depend_on_the_batch(scenes):
    lumas = np.stack([rgb_to_luma(s) for s in scenes[:5]])
    together, _ = niqe_features(lumas)
    alone = np.concatenate([niqe_features(g[None])[0] for g in lumas])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (5, 9, 36) and np.isfinite(together).all()


# -- NIQE --
def test_score_falls_with_degradation(niqe, scenes):
    test = scenes[40:]
    blur = [[degrade.blur(s, v) for s in test] for v in (0, .8, 1.5, 3)]
    jpeg = [[degrade.jpeg(s, v) for s in test] for v in (95, 40, 10)]
    for levels in (blur, jpeg):
        scores = np.array([niqe.score(x) for x in levels])
        assert spearmanr(np.repeat(range(len(levels)), len(test)), scores.ravel())[0] < -.6

def test_score_takes_every_form_of_image(niqe, scenes):
    s = scenes[41]
    a = niqe.score(s)
    assert np.ndim(a) == 0 and a < 0
    for other in (Face(s), s/255.): assert niqe.score(other) == pytest.approx(a, rel=1e-3)
    many = niqe.score(np.stack(scenes[41:44]))
    assert many.shape == (3,) and many.dtype == np.float64 and many[0] == pytest.approx(a, rel=1e-6)
    assert niqe.score(x for x in scenes[41:43]).shape == (2,)
    grey = rgb_to_luma(s).astype(np.uint8)
    assert niqe.score(grey) == pytest.approx(niqe.score(grey[..., None]), rel=1e-9)

def test_score_keeps_the_order_of_mixed_sizes(niqe, scenes):
    mixed = [scenes[40], scene(1, 150), scenes[41], scene(2, 150), scene(3, 61)]
    np.testing.assert_allclose(niqe.score(mixed), [niqe.score(s) for s in mixed], rtol=1e-5)

def test_odd_images_have_finite_scores(niqe, scenes):
    flat = [np.full((112, 112, 3), v, np.uint8) for v in (0, 90, 255)]
    odd = niqe.score([*flat, scenes[40][:56, :56], scenes[40][:70, :56]])
    assert np.isfinite(odd).all() and (odd[:3] < niqe.score(scenes[40:]).min()).all()

@pytest.mark.parametrize('image, message', [
    (np.full((112, 112), np.nan), 'image 0: holds NaN'), (np.full((112, 112), 1.5), 'divide by 255'), (np.zeros((40, 112), np.uint8), 'smaller'),
    (np.zeros((1, 1, 3), np.uint8), 'smaller'), (np.zeros((112, 112), np.int64), 'uint8'), (np.zeros((0, 5, 3), np.uint8), 'shape'),
    (np.zeros((112, 112, 4), np.uint8), 'shape')])
def test_images_that_cannot_be_scored(niqe, image, message):
    with pytest.raises(ImageError, match=message) as e: niqe.score([image])
    assert '\n' not in str(e.value)

def test_bad_options_and_bad_fits():
    for patch, step in ((56, 27), (56, 40), (56, 0)):
        with pytest.raises(DeepfidError, match='even and divide'): NIQE(patch, step)
    for images in ([], [np.full((112, 112), 7, np.uint8)]*20):
        with pytest.raises(DeepfidError, match='sharp patches'): NIQE().fit(images)

def test_files(niqe, scenes, tmp_path):
    path = niqe.save(tmp_path/'a.safetensors')
    again = NIQE.load(path)
    assert (again.score(scenes[40:]) == niqe.score(scenes[40:])).all() and again.provenance == niqe.provenance
    content = path.read_bytes()
    assert content == again.save(tmp_path/'b.safetensors').read_bytes()
    for name, bad in dict(empty=b'', cut=content[:200], short=content[:-8], flipped=content[:-1] + bytes([content[-1] ^ 1]),
            other=save(dict(mean=np.zeros(36))), text=b'hello',
            shapes=save(dict(mean=np.zeros(3), cov=np.zeros((3, 3))), metadata=dict(niqe=json.dumps(dict(sha256=''))))).items():
        (tmp_path/f'{name}.safetensors').write_bytes(bad)
        with pytest.raises(WeightsError, match=name): NIQE.load(tmp_path/f'{name}.safetensors')
    with pytest.raises(WeightsError, match='none.safetensors'): NIQE.load(tmp_path/'none.safetensors')
    with pytest.raises(WeightsError, match='moon'): load_niqe('moon')

def test_the_packaged_fit():
    packaged = load_niqe('synth')
    good, bad = packaged.score(faces), packaged.score([degrade.blur(f, 2) for f in faces])
    assert (good > bad).all() and packaged.provenance['images'] >= 100


# -- BRISQUE; its agreement with OpenCV is a cell of the notebook --
root = data_dir()
needs_brisque = pytest.mark.skipif(not (root and all((root/'models'/n).is_file() for n in B.BRISQUE_FILES)), reason="needs BRISQUE's model files")

@needs_brisque
def test_brisque_falls_with_blur_whatever_the_batch():
    measure = B.load_brisque()
    scores = measure.score(faces)
    assert all(measure.score(degrade.blur(f, 3.)) < s <= 100 for f, s in zip(faces, scores))
    np.testing.assert_allclose(scores, [measure.score(f) for f in faces])
    assert measure.score([]).shape == (0,)

@needs_brisque
@pytest.mark.parametrize('image', [np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8), np.tile(np.uint8([0, 255]), (64, 32))])
def test_brisque_of_odd_images_is_finite(image): assert np.isfinite(B.load_brisque().score(image))

@pytest.mark.parametrize('bad, message', [(np.zeros((64, 64, 3)), 'float64'), (np.zeros((8, 8, 3), np.uint8), 'at least 16x16'),
    (np.zeros((64, 64, 4), np.uint8), 'RGB')])
def test_images_that_brisque_cannot_score(bad, message):
    with pytest.raises(ImageError, match=message): B.brisque_features(bad)

def test_brisque_without_its_files(tmp_path, monkeypatch):
    import pooch
    def fail(*a, **k): raise ConnectionError
    monkeypatch.setattr(pooch, 'retrieve', fail)
    monkeypatch.setenv('DEEPFID_DATA', str(tmp_path))
    with pytest.raises(DataMissingError, match='download it from'): B.BRISQUE()
    (tmp_path/'models').mkdir()
    for n in B.BRISQUE_FILES: (tmp_path/'models'/n).write_text('%YAML:1.0')
    with pytest.raises(WeightsError, match='sha256'): B.BRISQUE()


# -- SER-FIQ --
def small(p=.4, passes=50, **kw):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
    return SERFIQ(backbone, nn.Sequential(nn.Dropout(p), nn.Linear(3*49, 16)), passes=passes, **kw)

def test_robustness_is_the_formula():
    e = torch.randn(2, 20, 8)
    u = e/e.norm(dim=-1, keepdim=True)
    want = [2/(1+np.exp(np.mean([(v[i]-v[j]).norm().item() for i in range(20) for j in range(i)]))) for v in u]
    np.testing.assert_allclose(embedding_robustness(e).numpy(), want, rtol=1e-5)
    assert embedding_robustness(torch.ones(1, 5, 3)).item() == 1.

def test_backbone_runs_once():
    m, seen = small(), []
    m.backbone.register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    m.score(faces)
    assert seen == [4]

def test_scores_do_not_depend_on_batch_or_order():
    m = small()
    together = m.score(faces)
    np.testing.assert_allclose(m.score(faces[::-1])[::-1], together, atol=1e-6)
    np.testing.assert_allclose([small().score(f) for f in faces], together, atol=1e-6)
    assert np.abs(small(seed=1).score(faces)-together).max() > 1e-5

def test_dropout_masks():
    m = small(passes=4000)
    mask = m.dropout_masks(147)
    assert abs((mask == 0).float().mean()-.4) < .01 and abs(mask.mean()-1) < .01 and m.dropout_masks(147) is mask
    m.seed = 1
    assert not torch.equal(m.dropout_masks(147), mask)
    m.passes = 7
    assert len(m.dropout_masks(4)) == 7

@pytest.mark.parametrize('make, message', [
    (lambda: SERFIQ(nn.Flatten(), nn.Sequential(nn.Linear(4, 2))), 'only nn.Dropout'), (lambda: small(passes=1), 'from 2'),
    (lambda: SERFIQ(nn.Flatten(), nn.Sequential(nn.Dropout(.3), nn.Linear(4, 4), nn.Dropout(.1))), 'only nn.Dropout'),
    (lambda: small(p=0.), 'between 0 and 1'), (lambda: small().score(np.zeros((64, 50, 3), np.uint8)), 'square'),
    (lambda: small().score(np.zeros((64, 64, 3))), 'uint8')])
def test_serfiq_errors(make, message):
    with pytest.raises(DeepfidError, match=message): make()

def test_packaged_embedder_falls_with_degradation_of_strangers():
    m, rng = load_serfiq(), np.random.default_rng(0)
    strangers = [pristine_face(930_000+i) for i in range(16)]
    good = m.score(strangers)
    dark = m.score([np.uint8(im*.08) for im in strangers])
    noisy = m.score([np.clip(im+rng.normal(0, 50, im.shape), 0, 255).astype(np.uint8) for im in strangers])
    assert (dark < good).mean() > .8 and (noisy < good).mean() > .7

def test_embedder_file(tmp_path):
    net = face_embedder().eval()
    path = save_embedder(net, tmp_path/'e.safetensors', seed=0)
    x = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(load_embedder(path)(x), net(x), atol=2e-2, rtol=1e-2) # half precision
    data = path.read_bytes()
    path.write_bytes(data[:-2]+b'\0\1')
    with pytest.raises(WeightsError, match='checksum'): load_embedder(path)
    path.write_bytes(data[:100])
    with pytest.raises(WeightsError, match='no readable embedder'): load_embedder(path)

def test_arcface_margin_only_makes_it_harder():
    c, y = torch.rand(6, 4)*.8, torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(arcface_loss(c, y, 0., 10.), nn.functional.cross_entropy(10*c, y), atol=1e-4, rtol=1e-4)
    assert arcface_loss(c, y, .5, 10.) > arcface_loss(c, y, .2, 10.) > arcface_loss(c, y, 0., 10.)

@pytest.mark.slow
def test_a_hundred_passes_cost_less_than_a_third_more():
    m = load_serfiq()
    assert np.median([relative_cost(m, torch.randn(16, 3, 112, 112).contiguous(memory_format=torch.channels_last), 7) for _ in range(3)]) < 1.3

def test_a_folder_is_listed_by_content(tmp_path, monkeypatch):
    from deepfid.quality.measures import folder_table
    png = cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for name in ('a.jfif', 'b', 'c.txt', 'd.png'): (tmp_path/name).write_bytes(png)
    (tmp_path/'notes.txt').write_text('no image')
    assert folder_table(tmp_path)['path'].tolist()==['a.jfif', 'b', 'c.txt', 'd.png']
    def refuse(folder): raise PermissionError(13, 'denied', str(folder))
    monkeypatch.setattr('os.listdir', refuse)
    with pytest.raises(DeepfidError, match='permission denied; make the folder readable'): folder_table(tmp_path)
