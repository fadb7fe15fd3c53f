"The explorers as controllers: a control is set, and what is shown follows. No browser, no training"
import io, time
from dataclasses import replace
from datetime import datetime
import numpy as np, pytest
from PIL import Image
from deepfid.core import ConsentError, DeepfidError, Detector, Face, NoFaceError, Prediction
from deepfid.data.degrade import jpeg
from deepfid.data.faces import align
from deepfid.data.synth import draw_face
from deepfid.evaluate.metrics import MetricError, confusion
from deepfid.explore import score
from deepfid.explore.evaluation import EvaluationExplorer, MappingExplorer, bars_svg, errors_by, fit_mapping, quality_bands
from deepfid.explore.forgery import FORGERS, ForgeryExplorer, agreement, draw_forgery, masks_of
from deepfid.explore.maps import (InvarianceExplorer, SimilarityExplorer, SSAAExplorer, asymmetry, forge_inside, layer_maps, mirror_mix,
    region_at, right_pairs, seen_from, tint, true_map)
from deepfid.explore.score import Reading, ScoreExplorer, face_from_upload, gauge, spoil

class Bright(Detector):
    "Bright is real; a mask and a map of pairs that follow the brightness of 4x4 places"
    name, threshold = 'bright', .5
    def __init__(self, mask=True, pairs=True): self.mask, self.pairs, self.asked = mask, pairs, 0
    def predict(self, faces, batch_size=32):
        self.asked += 1
        return [self.one(np.asarray(f, float).mean(2)/255) for f in faces]
    def one(self, a):
        m = a.reshape(4, len(a)//4, 4, -1).mean((1, 3))
        return Prediction(a.mean(), m if self.mask else None, abs(m.reshape(-1, 1)-m.ravel()) if self.pairs else None)

class Sharp:
    "A quality that falls with blur"
    def score(self, image): return float(np.abs(np.diff(image.astype(int), axis=1)).mean())

@pytest.fixture(scope='module')
def faces(): return {f'drawn {s}': align(draw_face(s), 64) for s in (1, 2)}

def upload(explorer, name, content):
    explorer.upload.value = (dict(name=name, type='', size=len(content), content=memoryview(content), last_modified=datetime.now()),)
    return explorer.words.value

def encoded(image, format, **kw):
    image.save(out := io.BytesIO(), format, **kw)
    return out.getvalue()

# -- score ----------------------------------------------------------------------------------------------------------

def test_a_slider_spoils_and_reads_again(faces):
    e = ScoreExplorer({'one': Bright(), 'two': Bright(mask=False)}, faces, Sharp())
    image = faces['drawn 1'].image
    before, shown, q = e.readings['one'].prediction.fidelity, e.shown.value, e.q
    assert before == pytest.approx(image.mean()/255)
    e.damage['blur'].value = 3
    assert e.q < q and e.shown.value != shown and f'quality {e.q:.2f}' in e.words.value
    e.damage['blur'].value, e.damage['jpeg'].value = 0, 5
    assert e.readings['two'].prediction.fidelity == pytest.approx(jpeg(image, 5).mean()/255)
    e.damage['jpeg'].value = 100
    assert e.readings['one'].prediction.fidelity == before and e.shown.value == shown
    e.pick.value = 'drawn 2'
    assert e.readings['one'].prediction.fidelity == pytest.approx(faces['drawn 2'].image.mean()/255)

def test_one_detector_goes_by_its_own_name(faces):
    assert list(ScoreExplorer(Bright(), faces).readings) == ['bright']

@pytest.mark.parametrize('name, content, says', [
    ('notes.txt', b'hello', 'not a picture'), ('empty.jpg', b'', 'empty'), ('paper.pdf', b'%PDF-1.7 ...', 'is a PDF'),
    ('half.png', encoded(Image.new('RGB', (99, 99)), 'PNG')[:60], 'half.png'),
    ('huge.png', encoded(Image.new('1', (20_000, 10_000)), 'PNG'), 'refused before decoding'),
    ('<b>wall</b>.png', encoded(Image.new('RGB', (300, 200), 'grey'), 'PNG'), 'no face found')], ids=lambda v: v if isinstance(v, str) else '')
def test_a_bad_upload_is_one_line(faces, name, content, says, monkeypatch):
    monkeypatch.setattr('deepfid.data.faces.find_face', lambda image, finder=None: (_ for _ in ()).throw(NoFaceError('this picture: no face found')))
    e = ScoreExplorer(Bright(), faces)
    words = upload(e, name, content)
    assert says in words and name.split('<')[0] in words and '\n' not in words and '<b>' not in words
    assert list(e.faces) == list(faces) and e.pick.value == 'drawn 1'
    e.damage['blur'].value = 1
    assert 'fidelity' in e.words.value

def test_an_upload_joins_the_faces_and_an_animation_is_named(faces, monkeypatch):
    monkeypatch.setattr('deepfid.data.faces.find_face', lambda image, finder=None: Face(image, points=draw_face(5, 96).points))
    frames = [Image.fromarray(draw_face(s, 96).image) for s in (5, 6, 7)]
    e = ScoreExplorer(Bright(), faces)
    words = upload(e, 'dance.gif', encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]))
    assert e.pick.value == 'dance.gif' and 'animation of 3 frames' in words and 'fidelity' in words
    assert not e.faces['dance.gif'].consent and e.faces['dance.gif'].image.shape == (64, 64, 3)
    assert 'animation' not in upload(e, 'still.png', encoded(frames[0], 'PNG')) and list(e.faces) == [*faces, 'dance.gif', 'still.png']

def test_another_photograph_of_the_same_name_is_shown(faces, monkeypatch):
    monkeypatch.setattr('deepfid.data.faces.find_face', lambda image, finder=None: Face(image, points=draw_face(5, 96).points))
    e = ScoreExplorer(Bright(), faces)
    upload(e, 'image.png', encoded(Image.fromarray(draw_face(5, 96).image), 'PNG'))
    before = e.shown.value
    upload(e, 'image.png', encoded(Image.fromarray(255-draw_face(5, 96).image), 'PNG'))
    assert e.pick.value == 'image.png' and e.shown.value != before

def test_gauge_shows_targets_only_where_there_are_some():
    plain, mapped = gauge(Reading(Prediction(.3), .5)), gauge(Reading(Prediction(.3), .5, (.2, .8)))
    assert 'if real' not in plain and 'if real' in mapped and '0.30' in plain and 'nan' not in plain

def test_unknown_damage():
    with pytest.raises(DeepfidError, match='choose one of'): score.sweep(Bright(), None, 'fog')

# -- forgery --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('forger', FORGERS)
def test_forgery_of_the_sliders_can_be_drawn_again(forger):
    e = ForgeryExplorer(size=96)
    e.forger.value, e.seed.value = forger, 4
    again = draw_forgery(11, 3, forger, 4, size=96)
    assert (e.forgery.fake == again.fake).all() and forger in e.forgery.method
    assert agreement(e.masks) == agreement(masks_of(again)) and all(f'{v:.2f}' in e.words.value for v in agreement(e.masks).values())

def test_thresholds_and_compression_move_the_masks():
    e = ForgeryExplorer(size=96)
    marked = lambda: {k: m.sum() for k, m in e.masks.items()}
    usual = marked()
    e.diff.value = e.ssim.value = 0.
    loose = marked()
    e.diff.value = e.ssim.value = .5
    assert loose['DIFF'] > usual['DIFF'] > marked()['DIFF'] and loose['SSIM'] > usual['SSIM'] and loose['true'] == usual['true']
    e.diff.value = 0.
    outside = lambda: e.masks['DIFF'][e.forgery.mask == 0].sum()
    assert outside() == 0
    e.jpeg.value = 20
    assert outside() > 0

# -- similarity -----------------------------------------------------------------------------------------------------

def test_click_tints_by_the_row_of_the_map(faces):
    e = SimilarityExplorer(Bright(), faces)
    assert len(e.buttons) == 16
    asked = e.detector.asked
    e.buttons[5].click()
    assert e.detector.asked == asked and e.buttons[5].layout.border_top == '3px solid white' != e.buttons[4].layout.border_top
    assert [b.style.button_color for b in e.buttons] == [tint(p) for p in e.said.similarity[5]] and 'row 2, column 2' in e.words.value
    e.kind.value = 'true'
    assert e.detector.asked == asked
    assert [b.style.button_color for b in e.buttons] == [tint(p) for p in true_map(e.forgery.mask, 16)[5]]

def test_the_forged_region_follows_the_sliders(faces):
    e = SimilarityExplorer(Bright(), faces)
    def middle(): return np.argwhere(e.forgery.mask > .5).mean(0)[::-1]/64
    e.x.value, e.y.value, e.width.value, e.height.value = .3, .4, .3, .3
    assert middle() == pytest.approx([.3, .4], abs=.06)
    e.x.value = .7
    assert middle() == pytest.approx([.7, .4], abs=.06)
    e.x.value = e.y.value = 1.
    assert 'pairs that agree' in e.words.value and 'nan' not in e.words.value
    e.x.value, e.y.value = .7, .4
    round_one = e.forgery.mask.sum()
    e.shape.value = 'rectangle'
    assert e.forgery.mask.sum() > round_one

def test_nobody_is_shown_forged_without_consent(faces):
    stranger = replace(faces['drawn 1'], consent=False, identity='somebody')
    with pytest.raises(ConsentError, match='somebody: no consent'): forge_inside(stranger, region_at(64, .5, .5, .4, .4))
    e = SimilarityExplorer(Bright(), faces | {'stranger': stranger})
    shown = e.shown.value
    e.pick.value = 'stranger'
    assert 'no consent' in e.words.value and e.shown.value == shown

def test_explorers_of_maps_say_what_they_need(faces):
    with pytest.raises(DeepfidError, match='no map of pairs'): SimilarityExplorer(Bright(pairs=False), faces)
    assert 'no mask' in InvarianceExplorer(Bright(mask=False), faces).words.value
    with pytest.raises(DeepfidError, match='ellipse, rectangle'): region_at(9, .5, .5, .5, .5, 'star')

def test_pairs():
    mask = np.zeros((8, 8), np.float32); mask[:4, :4] = 1
    target = true_map(mask, 4)
    assert seen_from(target, 0).tolist() == [[0, 1], [1, 1]] and seen_from(target, 3).tolist() == [[1, 0], [0, 0]]
    assert right_pairs(target, target) == (1, 1) and right_pairs(1-target, target) == (0, 0)
    assert np.isnan(right_pairs(np.zeros((4, 4)), np.zeros((4, 4)))[0])

# -- invariance and mirror ------------------------------------------------------------------------------------------

def test_invariance_is_exact_for_equal_copies_and_not_for_others(faces):
    e = InvarianceExplorer(Bright(), faces)
    assert 'mean |difference| 0.000' in e.words.value
    shown = e.shown.value
    e.damage['jpeg'].value = 3
    a, b = e.said['bright']
    assert f'mean |difference| {np.abs(a.mask-b.mask).mean():.3f}' in e.words.value and e.shown.value != shown
    assert (a.mask == Bright().predict([faces['drawn 1'].image])[0].mask).all()

def test_mirror_turns_symmetry_and_asymmetry_up_and_down(faces):
    maps = {name: np.random.default_rng(i).normal(size=(3, 8, 8)) for i, name in enumerate(faces)}
    e = SSAAExplorer(faces, maps, (.7, .3))
    assert np.allclose(e.mixed, .7*maps['drawn 1']+.3*maps['drawn 1'][..., ::-1])
    e.w1.value = .5
    assert e.w2.value == .5 and asymmetry(e.mixed) < 1e-12
    e.one.value, e.w2.value = False, -.5
    assert asymmetry(e.mixed) == pytest.approx(1) and e.w1.value == .5
    e.pick.value, e.channel.value = 'drawn 2', 2
    assert np.allclose(e.mixed, mirror_mix(maps['drawn 2'], .5, -.5))

# -- evaluation -----------------------------------------------------------------------------------------------------

@pytest.fixture
def scores():
    rng, label = np.random.default_rng(0), np.arange(80)%2
    return rng.normal(label*.3+.35, .25), label, rng.normal(size=80)

def test_errors_add_up_to_the_confusion(scores):
    fidelity, label, quality = scores
    groups = quality_bands(quality)
    assert list(errors_by(fidelity, label, .5, groups)) == ['worst quarter', 'second', 'third', 'best quarter']
    groups = np.array(groups)
    assert sorted(np.unique(groups, return_counts=True)[1]) == [20]*4
    assert set(groups[quality.argsort()[:20]]) == {'worst quarter'} and set(groups[quality.argsort()[-20:]]) == {'best quarter'}
    for t in (-1, .4, .6, 2):
        total = np.sum(list(errors_by(fidelity, label, t, groups).values()), axis=0)
        (ok, accused), (missed, hit) = confusion(fidelity, label, t)
        assert total.tolist() == [ok+accused, accused, missed+hit, missed]

def test_threshold_is_dragged(scores):
    fidelity, label, quality = scores
    e = EvaluationExplorer(fidelity, label, .5, {'quality': quality_bands(quality), 'parity': label})
    page = e.page.value
    assert e.words.value.count(f'{((fidelity >= .5) == label).mean():.3f}') == 2
    e.threshold.value = e.threshold.max
    assert e.page.value != page and f'accuracy {e.accuracy(e.threshold.value):.3f} here' in e.words.value
    for n in confusion(fidelity, label, e.threshold.value).ravel(): assert f'>{n}</td>' in e.page.value
    e.by.value = 'parity'
    assert 'best quarter' not in e.page.value

@pytest.mark.parametrize('change, says', [(dict(groups={'a': ['x']}), "groups 'a'"), (dict(groups={'a': [None]*80}), "groups 'a'"),
    (dict(fidelity=[np.nan]*80), 'row 0'), (dict(label=[1]*80), 'only real')])
def test_scores_that_make_no_evaluation(scores, change, says):
    with pytest.raises(MetricError, match=says): EvaluationExplorer(**(dict(fidelity=scores[0], label=scores[1])|change))

def test_names_of_groups_are_text_and_empty_classes_have_no_bar():
    drawn = bars_svg(errors_by(np.array([.2, .8]), np.array([0, 1]), .5, ['<script>', 'b']))
    assert '<script>' not in drawn and drawn.count('<rect') == 2

def test_mapping_follows_face_bands_and_outlier(faces):
    rng, label = np.random.default_rng(0), np.arange(60)%2
    e = MappingExplorer(Sharp(), {k: f.image for k, f in faces.items()}, rng.uniform(1, 12, 60), label)
    target = lambda real=True: float(e.mapping.transform(e.q, real))
    q, usual = e.q, target()
    e.worst.value = 5
    assert target() > usual
    e.method.value = 'rank'
    by_rank = target()
    e.worst.value = 0
    assert target() == pytest.approx(by_rank, abs=.02)
    e.damage['blur'].value = 4
    assert e.q < q and target() < by_rank
    e.real.value = (.2, 1)
    assert 'overlap' in e.words.value
    e.real.value = (.8, .9)
    assert .8 <= target() <= .9 and f'if real {target():.2f}' in e.words.value

# -- speed ----------------------------------------------------------------------------------------------------------

def test_every_step_takes_less_than_150_ms_of_the_processor(faces):
    import torch
    from deepfid.models.deepfidelity.detector import DeepFidelity
    from deepfid.models.lisiam.detector import LiSiam
    from deepfid.models.local_similarity.detector import LocalSimilarity
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fidelity, similarity, siamese = (c().configure('tiny') for c in (DeepFidelity, LocalSimilarity, LiSiam))
    large = {k: align(draw_face(i), 128) for i, k in enumerate(faces)}
    rng, label = np.random.default_rng(0), np.arange(1000)%2
    s, f = ScoreExplorer({'a': fidelity, 'b': similarity, 'c': siamese}, large, Sharp()), ForgeryExplorer()
    p, i = SimilarityExplorer(similarity, large), InvarianceExplorer({'b': similarity, 'c': siamese}, large)
    m, v = SSAAExplorer(large, dict(zip(large, layer_maps(fidelity, list(large.values()))))), EvaluationExplorer(rng.normal(size=1000), label, .5, {'all': label})
    q = MappingExplorer(Sharp(), {k: x.image for k, x in large.items()}, rng.normal(size=1000), label)
    steps = dict(score=lambda k: s.damage['jpeg'].set_trait('value', 50+k), forgery=lambda k: f.person.set_trait('value', 50+k),
        similarity=lambda k: p.x.set_trait('value', .3+.05*k), click=p.click, invariance=lambda k: i.damage['jpeg'].set_trait('value', 50+k),
        mirror=lambda k: m.w1.set_trait('value', .1*k), evaluation=lambda k: v.threshold.set_trait('value', .1*k), mapping=lambda k: q.damage['jpeg'].set_trait('value', 50+k))
    def seconds(step, k):
        start = time.process_time()
        step(k)
        return time.process_time()-start
    try: took = {name: 1000*float(np.median([seconds(step, k) for k in range(7)])) for name, step in steps.items()}
    finally: torch.set_num_threads(threads)
    print({name: f'{ms:.0f} ms' for name, ms in took.items()})
    assert max(took.values()) < 150, took
