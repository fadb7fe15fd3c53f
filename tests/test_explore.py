"The explorers as controllers: a control is set, and what is shown follows. No browser, no training"
import io, time
from dataclasses import replace
from datetime import datetime
import numpy as np, pytest
from PIL import Image
from deepfid.core import ConsentError, DeepfidError, Detector, Face, NoFaceError, Prediction
from deepfid.data.degrade import jpeg
from deepfid.data.faces import align_face
from deepfid.data.synth import synthetic_face
from deepfid.evaluate.metrics import MetricError, confusion_matrix
from deepfid.explore.evaluation import (EvaluationExplorer, MappingExplorer, fit_mapping_with_outlier, group_errors, group_errors_svg,
    quality_groups)
from deepfid.explore.forgery import FORGERS, ForgeryExplorer, compare_masks, mask_ious, synthetic_forgery
from deepfid.explore.maps import (InvarianceExplorer, SimilarityExplorer, SSAAExplorer, asymmetry, difference_colour, layer_feature_maps,
    mix_mirrored, pair_accuracy, region_mask, self_blend_region, similarity_row, true_similarity)
from deepfid.explore.score import DetectorResult, ScoreExplorer, gauge_svg

class BrightnessDetector(Detector):
    "Bright is real; mask and similarity matrix follow the brightness of 4x4 positions"
    name, threshold = 'brightness', .5
    def __init__(self, mask=True, similarity=True): self.mask, self.similarity, self.calls = mask, similarity, 0
    def predict(self, faces, batch_size=32):
        self.calls += 1
        return [self.predict_one(np.asarray(f, float).mean(2)/255) for f in faces]
    def predict_one(self, a):
        m = a.reshape(4, len(a)//4, 4, -1).mean((1, 3))
        return Prediction(a.mean(), m if self.mask else None, abs(m.reshape(-1, 1)-m.ravel()) if self.similarity else None)

class Sharpness:
    "A quality measure that falls with blur"
    def score(self, image): return float(np.abs(np.diff(image.astype(int), axis=1)).mean())

@pytest.fixture(scope='module')
def faces(): return {f'synthetic {s}': align_face(synthetic_face(s, 128), 64) for s in (1, 2)}

def upload(explorer, name, content):
    explorer.upload.value = (dict(name=name, type='', size=len(content), content=memoryview(content), last_modified=datetime.now()),)
    return explorer.status.value

def encode(image, format, **kw):
    image.save(out := io.BytesIO(), format, **kw)
    return out.getvalue()

# -- score ----------------------------------------------------------------------------------------------------------

def test_a_slider_degrades_and_scores_again(faces):
    e = ScoreExplorer({'one': BrightnessDetector(), 'two': BrightnessDetector(mask=False)}, faces, Sharpness())
    image, fidelity = faces['synthetic 1'].image, lambda name: e.results[name].prediction.fidelity
    before, shown, q = fidelity('one'), e.image_view.value, e.quality_value
    assert before == pytest.approx(image.mean()/255)
    e.degradation['blur'].value = 3
    assert e.quality_value < q and e.image_view.value != shown and f'quality {e.quality_value:.2f}' in e.status.value
    e.degradation['blur'].value, e.degradation['jpeg'].value = 0, 5
    assert fidelity('two') == pytest.approx(jpeg(image, 5).mean()/255)
    e.degradation['jpeg'].value = 100
    assert fidelity('one') == before and e.image_view.value == shown
    e.face_menu.value = 'synthetic 2'
    assert fidelity('one') == pytest.approx(faces['synthetic 2'].image.mean()/255)

def test_one_detector_goes_by_its_own_name(faces):
    assert list(ScoreExplorer(BrightnessDetector(), faces).results) == ['brightness']

@pytest.mark.parametrize('name, content, message', [
    ('empty.jpg', b'', 'empty'), ('half.png', encode(Image.new('RGB', (99, 99)), 'PNG')[:60], 'half.png'),
    ('huge.png', encode(Image.new('1', (20_000, 10_000)), 'PNG'), 'refused before decoding'),
    ('<b>wall</b>.png', encode(Image.new('RGB', (300, 200), 'grey'), 'PNG'), 'no face found')], ids=lambda v: v if isinstance(v, str) else '')
def test_a_bad_upload_is_one_line(faces, name, content, message, monkeypatch):
    monkeypatch.setattr('deepfid.data.faces.find_face', lambda image, finder=None: (_ for _ in ()).throw(NoFaceError('no face found')))
    e = ScoreExplorer(BrightnessDetector(), faces)
    status = upload(e, name, content)
    assert message in status and name.split('<')[0] in status and '\n' not in status and '<b>' not in status
    assert list(e.faces) == list(faces) and e.face_menu.value == 'synthetic 1'
    e.degradation['blur'].value = 1
    assert 'fidelity' in e.status.value

def test_an_upload_joins_the_faces(faces, monkeypatch):
    points = synthetic_face(5, 96).points
    monkeypatch.setattr('deepfid.data.faces.find_face', lambda image, finder=None: Face(image, points=points))
    frames = [Image.fromarray(synthetic_face(s, 96).image) for s in (5, 6)]
    e = ScoreExplorer(BrightnessDetector(), faces)
    status = upload(e, 'dance.gif', encode(frames[0], 'GIF', save_all=True, append_images=frames[1:]))
    assert e.face_menu.value == 'dance.gif' and 'animation of 2 frames' in status and 'fidelity' in status
    assert not e.faces['dance.gif'].consent and e.faces['dance.gif'].image.shape == (64, 64, 3)
    assert 'animation' not in upload(e, 'still.png', encode(frames[0], 'PNG')) and list(e.faces) == [*faces, 'dance.gif', 'still.png']
    shown = e.image_view.value
    upload(e, 'still.png', encode(frames[1], 'PNG'))
    assert e.face_menu.value == 'still.png' and e.image_view.value != shown, 'another photograph of the same name is shown'

def test_gauge_shows_targets_only_where_there_are_some():
    plain, mapped = gauge_svg(DetectorResult(Prediction(.3), .5)), gauge_svg(DetectorResult(Prediction(.3), .5, (.2, .8)))
    assert 'if real' not in plain and 'if real' in mapped and '0.30' in plain and 'nan' not in plain

# -- forgery --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('forger', FORGERS)
def test_a_forgery_can_be_made_again(forger):
    e = ForgeryExplorer(size=96)
    e.forger.value, e.seed.value = forger, 4
    again = synthetic_forgery(11, 3, forger, 4, size=96)
    assert (e.forgery.fake == again.fake).all() and forger in e.forgery.method
    assert mask_ious(e.masks) == mask_ious(compare_masks(again)) and all(f'{v:.2f}' in e.status.value for v in mask_ious(e.masks).values())

def test_thresholds_and_compression_move_the_masks():
    e = ForgeryExplorer(size=96)
    marked = lambda: {k: m.sum() for k, m in e.masks.items()}
    default = marked()
    e.diff.value = e.ssim.value = 0.
    low = marked()
    e.diff.value = e.ssim.value = .5
    assert low['DIFF'] > default['DIFF'] > marked()['DIFF'] and low['SSIM'] > default['SSIM'] and low['true'] == default['true']
    e.diff.value = 0.
    outside = lambda: e.masks['DIFF'][e.forgery.mask == 0].sum()
    assert outside() == 0
    e.jpeg.value = 20
    assert outside() > 0

# -- similarity -----------------------------------------------------------------------------------------------------

def test_a_click_colours_by_the_row_of_the_matrix(faces):
    e = SimilarityExplorer(BrightnessDetector(), faces)
    assert len(e.buttons) == 16
    calls = e.detector.calls
    e.buttons[5].click()
    assert e.buttons[5].layout.border_top == '3px solid white' != e.buttons[4].layout.border_top
    assert [b.style.button_color for b in e.buttons] == [difference_colour(p) for p in e.prediction.similarity[5]]
    assert 'row 2, column 2' in e.status.value
    e.matrix_menu.value = 'true'
    assert e.detector.calls == calls
    assert [b.style.button_color for b in e.buttons] == [difference_colour(p) for p in true_similarity(e.forgery.mask, 16)[5]]

def test_the_forged_region_follows_the_sliders(faces):
    e = SimilarityExplorer(BrightnessDetector(), faces)
    def centre(): return np.argwhere(e.forgery.mask > .5).mean(0)[::-1]/64
    e.x.value, e.y.value, e.width.value, e.height.value = .3, .4, .3, .3
    assert centre() == pytest.approx([.3, .4], abs=.06)
    e.x.value = .7
    assert centre() == pytest.approx([.7, .4], abs=.06)
    e.x.value = e.y.value = 1.
    assert 'pairs that agree' in e.status.value and 'nan' not in e.status.value
    e.x.value, e.y.value = .7, .4
    ellipse = e.forgery.mask.sum()
    e.shape.value = 'rectangle'
    assert e.forgery.mask.sum() > ellipse

def test_nobody_is_shown_forged_without_consent(faces):
    stranger = replace(faces['synthetic 1'], consent=False, identity='somebody')
    with pytest.raises(ConsentError, match='somebody: no consent'): self_blend_region(stranger, region_mask(64, .5, .5, .4, .4))
    e = SimilarityExplorer(BrightnessDetector(), faces | {'stranger': stranger})
    shown = e.image_view.value
    e.face_menu.value = 'stranger'
    assert 'no consent' in e.status.value and e.image_view.value == shown

def test_a_detector_without_the_output_is_refused(faces):
    with pytest.raises(DeepfidError, match='predicts no similarity matrix'): SimilarityExplorer(BrightnessDetector(similarity=False), faces)
    assert 'predicts no mask' in InvarianceExplorer(BrightnessDetector(mask=False), faces).status.value
    with pytest.raises(DeepfidError, match="'ellipse', 'rectangle'"): region_mask(9, .5, .5, .5, .5, 'star')

def test_pairs():
    mask = np.zeros((8, 8), np.float32); mask[:4, :4] = 1
    target = true_similarity(mask, 4)
    assert similarity_row(target, 0).tolist() == [[0, 1], [1, 1]] and similarity_row(target, 3).tolist() == [[1, 0], [0, 0]]
    assert pair_accuracy(target, target) == (1, 1) and pair_accuracy(1-target, target) == (0, 0)
    assert np.isnan(pair_accuracy(np.zeros((4, 4)), np.zeros((4, 4)))[0])

# -- invariance and mirror ------------------------------------------------------------------------------------------

def test_invariance_is_exact_for_equal_copies_and_not_for_others(faces):
    e = InvarianceExplorer(BrightnessDetector(), faces)
    assert 'mean |difference| 0.000' in e.status.value
    shown = e.image_view.value
    e.degradation['jpeg'].value = 3
    a, b = e.predictions['brightness']
    assert f'mean |difference| {np.abs(a.mask-b.mask).mean():.3f}' in e.status.value and e.image_view.value != shown
    assert (a.mask == BrightnessDetector().predict([faces['synthetic 1'].image])[0].mask).all()

def test_the_mirror_scales_symmetry_and_asymmetry(faces):
    maps = {name: np.random.default_rng(i).normal(size=(3, 8, 8)) for i, name in enumerate(faces)}
    first, second = maps.values()
    e = SSAAExplorer(faces, maps, (.7, .3))
    assert np.allclose(e.mixed, .7*first+.3*first[..., ::-1])
    e.w1.value = .5
    assert e.w2.value == .5 and asymmetry(e.mixed) < 1e-12
    e.sum_to_one.value, e.w2.value = False, -.5
    assert asymmetry(e.mixed) == pytest.approx(1) and e.w1.value == .5
    e.face_menu.value, e.channel.value = 'synthetic 2', 2
    assert np.allclose(e.mixed, mix_mirrored(second, .5, -.5))

# -- evaluation -----------------------------------------------------------------------------------------------------

@pytest.fixture
def scores():
    rng, label = np.random.default_rng(0), np.arange(80)%2
    return rng.normal(label*.3+.35, .25), label, rng.normal(size=80)

def test_errors_add_up_to_the_confusion_matrix(scores):
    fidelity, label, quality = scores
    groups = quality_groups(quality)
    assert list(group_errors(fidelity, label, .5, groups)) == ['worst quarter', 'second', 'third', 'best quarter']
    groups = np.array(groups)
    assert sorted(np.unique(groups, return_counts=True)[1]) == [20]*4
    assert set(groups[quality.argsort()[:20]]) == {'worst quarter'} and set(groups[quality.argsort()[-20:]]) == {'best quarter'}
    for t in (-1, .4, .6, 2):
        total = np.sum(list(group_errors(fidelity, label, t, groups).values()), axis=0)
        (tn, fp), (fn, tp) = confusion_matrix(fidelity, label, t)
        assert total.tolist() == [tn+fp, fp, fn+tp, fn]

def test_threshold_is_dragged(scores):
    fidelity, label, quality = scores
    e = EvaluationExplorer(fidelity, label, .5, {'quality': quality_groups(quality), 'parity': label})
    page = e.page.value
    assert e.status.value.count(f'{((fidelity >= .5) == label).mean():.3f}') == 2
    e.threshold.value = e.threshold.max
    assert e.page.value != page and f'accuracy {e.accuracy(e.threshold.value):.3f} here' in e.status.value
    for n in confusion_matrix(fidelity, label, e.threshold.value).ravel(): assert f'>{n}</td>' in e.page.value
    e.group_menu.value = 'parity'
    assert 'best quarter' not in e.page.value

@pytest.mark.parametrize('change, message', [(dict(groups={'a': ['x']}), "groups 'a'"), (dict(groups={'a': [None]*80}), "groups 'a'"),
    (dict(fidelity=[np.nan]*80), 'row 0|NaN'), (dict(label=[1]*80), 'real')])
def test_scores_that_make_no_evaluation(scores, change, message):
    with pytest.raises((MetricError, DeepfidError), match=message):
        EvaluationExplorer(**(dict(fidelity=scores[0], label=scores[1])|change))

def test_names_of_groups_are_text_and_empty_classes_have_no_bar():
    drawing = group_errors_svg(group_errors(np.array([.2, .8]), np.array([0, 1]), .5, ['<script>', 'b']))
    assert '<script>' not in drawing and drawing.count('<rect') == 2

def test_mapping_follows_face_bands_and_outlier(faces):
    rng, label = np.random.default_rng(0), np.arange(60)%2
    e = MappingExplorer(Sharpness(), {k: f.image for k, f in faces.items()}, rng.uniform(1, 12, 60), label)
    target = lambda: float(e.mapping.transform(e.quality_value, True))
    q, default = e.quality_value, target()
    assert default == float(fit_mapping_with_outlier(e.quality, label).transform(q, True))
    e.outlier.value = 5
    assert target() > default
    e.method.value = 'rank'
    by_rank = target()
    e.outlier.value = 0
    assert target() == pytest.approx(by_rank, abs=.02)
    e.degradation['blur'].value = 4
    assert e.quality_value < q and target() < by_rank
    e.real.value = (.2, 1)
    assert 'overlap' in e.status.value
    e.real.value = (.8, .9)
    assert .8 <= target() <= .9 and f'if real {target():.2f}' in e.status.value

# -- what a reader needs to know -------------------------------------------------------------------------------------

def widgets_of(view):
    yield view
    for child in getattr(view, 'children', ()): yield from widgets_of(child)

def test_sliders_are_wide_and_say_what_they_mean(faces, scores):
    import ipywidgets as w
    fidelity, label, quality = scores
    maps = {name: np.zeros((3, 8, 8)) for name in faces}
    detector, images = BrightnessDetector(), {k: f.image for k, f in faces.items()}
    for e in (ScoreExplorer(detector, faces), ForgeryExplorer(size=96), SimilarityExplorer(detector, faces), InvarianceExplorer(detector, faces),
            SSAAExplorer(faces, maps), EvaluationExplorer(fidelity, label), MappingExplorer(Sharpness(), images, quality, label)):
        found = list(widgets_of(e.view))
        sliders = [c for c in found if isinstance(c, (w.IntSlider, w.FloatSlider, w.FloatRangeSlider))]
        assert sliders and all(int(c.layout.width.removesuffix('px')) >= 400 and c.tooltip for c in sliders), type(e).__name__
        assert any(isinstance(c, w.HTML) and 'background:' in c.value and 'border-radius:2px' in c.value for c in found), 'a legend'

class Unmoved(BrightnessDetector):
    "Predicts the same for every face"
    def predict_one(self, a): return Prediction(.5, np.full((4, 4), .3), np.full((16, 16), .2))

def test_an_insensitive_detector_is_called_so(faces):
    e = ScoreExplorer({'moves': BrightnessDetector(), 'stays': Unmoved()}, faces | {'dark': replace(faces['synthetic 1'], image=faces['synthetic 1'].image//4)})
    assert 'insensitive' in e.notes['stays'] and not e.notes['moves'] and e.gauges.value.count('insensitive') == 1
    assert 'stays is' in InvarianceExplorer({'stays': Unmoved()}, faces).status.value and 'insensitive' in SimilarityExplorer(Unmoved(), faces).status.value
    assert 'insensitive' not in SimilarityExplorer(BrightnessDetector(), faces).status.value

def test_the_mirror_begins_at_the_weights_given(faces):
    e = SSAAExplorer(faces, {name: np.zeros((3, 8, 8)) for name in faces}, (.99, .05))
    assert (e.w1.value, e.w2.value, e.sum_to_one.value) == (.99, .05, False)

# -- speed ----------------------------------------------------------------------------------------------------------

def test_every_step_takes_less_than_150_ms_of_the_processor(faces):
    import torch
    from deepfid.models.registry import get_detector_class
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    deepfidelity, similarity, lisiam = (get_detector_class(c)().configure('tiny') for c in ('deepfidelity', 'local_similarity', 'lisiam'))
    large = {k: align_face(synthetic_face(i), 128) for i, k in enumerate(faces)}
    maps = dict(zip(large, layer_feature_maps(deepfidelity.model, list(large.values()), 'blocks1.0.attn')))
    rng, label = np.random.default_rng(0), np.arange(1000)%2
    s, f = ScoreExplorer({'a': deepfidelity, 'b': similarity, 'c': lisiam}, large, Sharpness()), ForgeryExplorer()
    p, i = SimilarityExplorer(similarity, large), InvarianceExplorer({'b': similarity, 'c': lisiam}, large)
    m, v = SSAAExplorer(large, maps), EvaluationExplorer(rng.normal(size=1000), label, .5, {'all': label})
    q = MappingExplorer(Sharpness(), {k: x.image for k, x in large.items()}, rng.normal(size=1000), label)
    steps = dict(score=lambda k: s.degradation['jpeg'].set_trait('value', 50+k), forgery=lambda k: f.person.set_trait('value', 50+k),
        similarity=lambda k: p.x.set_trait('value', .3+.05*k), click=p.click, invariance=lambda k: i.degradation['jpeg'].set_trait('value', 50+k),
        mirror=lambda k: m.w1.set_trait('value', .1*k), evaluation=lambda k: v.threshold.set_trait('value', .1*k),
        mapping=lambda k: q.degradation['jpeg'].set_trait('value', 50+k))
    def seconds(step, k):
        start = time.process_time()
        step(k)
        return time.process_time()-start
    try: took = {name: 1000*float(np.median([seconds(step, k) for k in range(5)])) for name, step in steps.items()}
    finally: torch.set_num_threads(threads)
    print({name: f'{ms:.0f} ms' for name, ms in took.items()})
    assert max(took.values()) < 150, took
