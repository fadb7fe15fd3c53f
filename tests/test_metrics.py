"deepfid.evaluate.metrics against scikit-learn, and every bad input"
import json
import numpy as np, pandas as pd, pytest
from sklearn import metrics as sk
from deepfid.core import DeepfidError
from deepfid.evaluate.metrics import MetricError, auc, auc_difference, auc_interval, average_precision, bootstrap_counts, boundary_f1, calibration_error, choose_threshold, confusion_matrix, equal_error_rate, evaluate, localisation_report, mask_iou, oracle_threshold, auc_per_method, pixel_auc, reliability_curve, roc_curve, score_face_mask, video_keys, video_scores


def scores(n=60, seed=0, gap=.2, decimals=None, p_real=.5):
    "Overlapping scores, unbalanced if asked, with ties if rounded, shuffled"
    rng = np.random.default_rng(seed)
    label = (np.arange(n) < n*p_real).astype(int); rng.shuffle(label)
    fid = rng.normal(.5+gap*(label-.5), .2)
    return (fid if decimals is None else fid.round(decimals)), label


CASES = [scores(), scores(decimals=1), scores(501, 1, .05, 2, .2), scores(40, 2, .9), scores(40, 3, -.5, 1), (np.array([.5]*6), np.array([0, 1]*3)), (np.array([-3., 4.]), np.array([1, 0]))]


@pytest.mark.parametrize('fid, lab', CASES)
def test_threshold_free_metrics_agree_with_sklearn(fid, lab):
    assert auc(fid, lab) == pytest.approx(sk.roc_auc_score(lab, fid), abs=1e-12)
    assert average_precision(fid, lab) == pytest.approx(sk.average_precision_score(lab == 0, -fid), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(lab == 0, -fid, drop_intermediate=False)
    t = np.linspace(0, 1, 20_001)                  # crossing of FNR and FPR on the drawn curve
    dense_fpr, dense_tpr = (np.interp(t, np.linspace(0, 1, len(fpr)), v) for v in (fpr, tpr))
    i = np.abs(dense_fpr-(1-dense_tpr)).argmin()
    assert equal_error_rate(fid, lab) == pytest.approx(dense_fpr[i], abs=2e-3)


@pytest.mark.parametrize('fid, lab', CASES)
@pytest.mark.parametrize('t', [.3, .5])
def test_threshold_metrics_agree_with_sklearn(fid, lab, t):
    m, predicted, truth = evaluate(fid, lab, t, n_boot=0), fid < t, lab == 0
    want = dict(accuracy=sk.accuracy_score(truth, predicted), balanced_accuracy=sk.balanced_accuracy_score(truth, predicted), precision=sk.precision_score(truth, predicted, zero_division=0),
                recall=sk.recall_score(truth, predicted), f1=sk.f1_score(truth, predicted, zero_division=0))
    for name, v in want.items(): assert m[name].value == pytest.approx(v, abs=1e-12), name
    assert m['accuracy_at_half'].value == pytest.approx(np.mean((fid >= .5) == lab))
    assert np.array_equal(confusion_matrix(fid, lab, t), sk.confusion_matrix(lab, fid >= t, labels=[1, 0]))


def test_roc_ends_and_area():
    fid, lab = scores(decimals=1)
    c = roc_curve(fid, lab)
    assert (c.fpr[0], c.tpr[0], c.fpr[-1], c.tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(c.tpr, c.fpr) == pytest.approx(auc(fid, lab), abs=1e-12)
    for k, t in enumerate(c.threshold):
        assert confusion_matrix(fid, lab, t)[0, 1]/lab.sum() == pytest.approx(c.fpr[k])


def test_counts_are_resamples():
    "The weighted metric of counts equals the plain metric of the repeated rows"
    fid, lab = scores(decimals=1)
    from deepfid.evaluate.metrics import _all_metrics
    for w in np.concatenate(list(bootstrap_counts(lab, n_boot=5, seed=1))):
        f, l = np.repeat(fid, w.astype(int)), np.repeat(lab, w.astype(int))
        got = _all_metrics(fid, lab, w[None], .4)
        assert got['auc'][0] == pytest.approx(sk.roc_auc_score(l, f)) and got['ap'][0] == pytest.approx(sk.average_precision_score(l == 0, -f))
        assert got['eer'][0] == pytest.approx(equal_error_rate(f, l)) and got['f1'][0] == pytest.approx(sk.f1_score(l == 0, f < .4))


def test_groups_are_resampled_together_and_classes_kept():
    lab = np.array([1, 1, 0, 0, 1, 0, 1, 0, 0, 1]); g = list('aabbccddef')
    w = np.concatenate(list(bootstrap_counts(lab, g, n_boot=200)))
    for name in set(g):
        cols = [i for i, x in enumerate(g) if x == name]
        assert (w[:, cols] == w[:, cols[:1]]).all()
    assert (w[:, lab == 1].sum(1) > 0).all() and (w[:, lab == 0].sum(1) > 0).all()
    assert np.array_equal(w, np.concatenate(list(bootstrap_counts(lab, g, n_boot=200))))
    assert not np.array_equal(w, np.concatenate(list(bootstrap_counts(lab, g, n_boot=200, seed=1))))


def test_intervals_narrow_with_more_data_and_hold_the_value():
    a, b = auc_interval(*scores(60)), auc_interval(*scores(1500))
    assert a.low < a.value < a.high and b.high-b.low < (a.high-a.low)/3
    assert auc_interval(*scores(60), level=.5).high < a.high
    assert auc_interval(*scores(60)) == a and str(a).startswith(f'{a.value:.3f} [')


def test_repeating_each_row_ten_times_does_not_narrow_a_grouped_interval():
    fid, lab = scores(80)
    rep = lambda x: np.repeat(x, 10)
    one, ten = auc_interval(fid, lab), auc_interval(rep(fid), rep(lab), groups=rep(np.arange(80)))
    naive = auc_interval(rep(fid), rep(lab))
    assert ten == pytest.approx(one) and naive.high-naive.low < .5*(one.high-one.low)


def test_one_group_alone_warns():
    with pytest.warns(UserWarning, match='too narrow'): auc_interval([.1, .2, .8, .9], [0, 0, 1, 1], groups=['x', 'y', 'z', 'z'], n_boot=5)


def test_thresholds():
    fid, lab = scores(200)
    t = choose_threshold(fid, lab)
    acc = lambda t: np.mean((fid >= t) == lab)
    assert acc(t) == max(acc(x) for x in np.linspace(-1, 2, 3001)) >= oracle_threshold(fid, lab)[1] >= acc(.5)
    cm = confusion_matrix(fid, lab, choose_threshold(fid, lab, 'eer'))
    assert abs(cm[0, 1]/cm[0].sum()-cm[1, 0]/cm[1].sum()) <= .02
    assert choose_threshold([.1, .2, .8, .9], [0, 0, 1, 1]) == pytest.approx(.5)
    fid, lab = scores(400, p_real=.05)
    rec = lambda by: np.diag(c := confusion_matrix(fid, lab, choose_threshold(fid, lab, by)))/c.sum(1)
    assert rec('balanced_accuracy').sum() >= rec('accuracy').sum()


# --- videos ---
@pytest.fixture
def frames():
    "Two methods whose videos share names, five frames each, and reals of the same names"
    rows = [(m, f'{v:03d}') for m in ('real', 'A', 'B') for v in range(6) for _ in range(5)]
    t = pd.DataFrame(rows, columns=['method', 'video']).assign(dataset='ff')
    rng = np.random.default_rng(0)
    t['fidelity'] = t.method.map(dict(real=.7, A=.2, B=.65))+rng.normal(0, .1, len(t))
    return t.assign(label=(t.method == 'real').astype(int))


def test_same_names_do_not_merge_and_order_is_immaterial(frames):
    v = video_scores(frames.fidelity, frames.label, frames)
    assert len(v.key) == 18 and v.key[0] == ('ff', 'real', '000') and (v.n_frames == 5).all() and v.label.sum() == 6
    s = frames.sample(frac=1, random_state=1)
    w = video_scores(s.fidelity, s.label, s)
    assert dict(zip(w.key, w.fidelity)) == pytest.approx(dict(zip(v.key, v.fidelity)))
    m, n = (evaluate(t.fidelity, t.label, video=t, n_boot=0) for t in (frames, s))
    assert {k: i.value for k, i in m.video.intervals.items()} == pytest.approx({k: i.value for k, i in n.video.intervals.items()})


def test_unequal_videos_count_once_each():
    v = video_scores([.9, .9, .9, .1, .5], [1, 1, 1, 1, 0], [('d', 'r', 'a')]*3+[('d', 'r', 'b'), ('d', 'f', 'a')])
    assert np.allclose(v.fidelity, [.9, .1, .5])
    m = video_scores([.9, .4, .4], [1, 1, 1], [('d', 'r', 'a')]*3, aggregate='majority')
    assert m.fidelity[0] == pytest.approx(1/3)


def test_video_metrics_resample_videos(frames):
    m = evaluate(frames.fidelity, frames.label, video=frames)
    assert m.n_groups == 18 and (m.video.n_real, m.video.n_fake, m.video.n_groups) == (6, 12, 18)
    by_person = evaluate(frames.fidelity, frames.label, video=frames, groups=frames.video)
    assert by_person.n_groups == by_person.video.n_groups == 6
    with pytest.raises(MetricError, match='two groups'): evaluate(frames.fidelity, frames.label, video=frames, groups=np.arange(len(frames)) % 7)


def test_flat_is_json(frames):
    m = evaluate(frames.fidelity, frames.label, video=frames, n_boot=50)
    d = json.loads(json.dumps(m.flat(), allow_nan=False))
    assert d['auc_low'] <= d['auc'] <= d['auc_high'] and 'video_auc_low' in d and d['n_real'] == 30
    assert ('video', 'value') in m.table() and m._repr_html_()


def test_short_keys_are_refused(frames):
    with pytest.raises(MetricError, match='dataset, method, video'): video_keys(frames.video)
    with pytest.raises(KeyError, match='method'): video_keys(frames.drop(columns='method'))
    with pytest.raises(MetricError, match='real and fake frames'): video_scores(frames.fidelity, frames.label, frames.assign(method='x'))
    with pytest.raises(MetricError, match='each of the 90'): video_scores(frames.fidelity, frames.label, frames[:-1])
    with pytest.raises(DeepfidError, match="aggregate='median'"): video_scores(frames.fidelity, frames.label, frames, 'median')


# --- comparisons ---
def test_difference():
    fid, lab = scores(200)
    assert tuple(auc_difference(fid, fid, lab)) == (0, 0, 0)
    worse = fid+np.random.default_rng(9).normal(0, .5, 200)
    d = auc_difference(worse, fid, lab)
    assert d.value == pytest.approx(auc(fid, lab)-auc(worse, lab)) and 0 < d.low < d.value < d.high


def test_per_group():
    fid, lab = scores(300); method = np.where(lab, 'real', np.where(np.arange(300) % 2, 'swap', 'mouth'))
    got = auc_per_method(fid, lab, method, n_boot=50)
    assert set(got) == {'swap', 'mouth'}
    for m in got:
        use = (lab == 1) | (method == m)
        assert got[m].value == pytest.approx(sk.roc_auc_score(lab[use], fid[use])) and got[m].low < got[m].high
    pair = np.tile(np.arange(2), 150)
    paired = auc_per_method(fid, lab, method, pair=np.where(lab, pair, method == 'swap').astype(int), n_boot=0)
    use = (method == 'swap') | ((lab == 1) & (pair == 1))
    assert paired['swap'].value == pytest.approx(sk.roc_auc_score(lab[use], fid[use]))


# --- masks ---
def test_masks():
    a, b = np.zeros((2, 10, 10)); a[:5] = 1; b[:, :5] = 1
    assert mask_iou(a, b) == pytest.approx(25/75) and mask_iou(a, 1-a) == 0 and mask_iou(a*0, b*0) == 1
    assert np.allclose(mask_iou(np.stack([a, b]), np.stack([a, a])), [1, 1/3])
    soft = a*.5+np.random.default_rng(0).random((10, 10))
    assert pixel_auc(soft, a) == pytest.approx(sk.roc_auc_score(a.ravel(), soft.ravel()))
    for bad in (a[:5], a[0], np.full((10, 10), np.nan)):
        with pytest.raises(DeepfidError, match='mask'): mask_iou(bad, a)
    with pytest.raises(MetricError, match='0 fake'): pixel_auc(a, a*0)


def test_a_full_mask_is_not_an_empty_one():
    full, none = np.ones((8, 8)), np.zeros((8, 8))
    assert boundary_f1(full, none)==boundary_f1(none, full)==0 and boundary_f1(full, full)==boundary_f1(none, none)==1

def test_equal_probabilities_are_one_group_of_a_reliability_curve():
    "However the faces are ordered"
    half, label = np.full(100, .5), np.repeat([1, 0], 50)
    curve = reliability_curve(half, label)
    assert curve.count.tolist()==[100] and curve.observed.tolist()==[.5] and calibration_error(half, label)==0
    p = np.linspace(.005, .995, 100)
    assert reliability_curve(p, label).count.tolist()==[10]*10

def test_boundary_f1_by_hand():
    a = np.zeros((20, 20)); a[5:15, 5:15] = 1 # an outline of 36 pixels
    assert boundary_f1(a, a) == 1 and boundary_f1(np.roll(a, 1, 1), a) == 1 # one pixel aside is near
    assert boundary_f1(a*0, a*0) == 1 and boundary_f1(a*0, a) == 0 == boundary_f1(a, a*0)
    b = np.zeros((20, 20)); b[5:15, 12:20] = 1 # its left edge is far from a's, and the border is no outline
    # near a lie, of b's 24 pixels, columns 12 to 15 of both lines and two of its left edge; of a's 36, columns 11 to 14
    # of both lines and two of its right edge
    precision, recall = 10/24, 10/36
    assert boundary_f1(b, a) == pytest.approx(2*precision*recall/(precision+recall))


def test_localisation_report_by_hand():
    a, b = np.zeros((2, 20, 20)); a[5:15, 5:15] = 1; b[5:15, 10:20] = 1
    empty, faint = np.zeros((20, 20)), np.full((20, 20), .6)
    scores = [score_face_mask(p, t, b) for p, t in ((a, a), (b, a), (empty, empty), (faint, empty))]
    assert [s.get('iou') for s in scores] == [1, pytest.approx(1/3), None, None]
    assert scores[3]['max'] == pytest.approx(.6) and scores[3]['area'] == 1 and scores[0]['area'] == .25
    r = localisation_report(scores, [0, 0, 1, 1], [True, False, False, True])
    assert r['iou'] == pytest.approx(2/3) and r['iou_gain'] == pytest.approx(1/3)
    assert r['iou_gain_flagged'] == pytest.approx(2/3) and r['iou_gain_missed'] == 0
    assert r['marked_reals'] == .5 and r['auc_by_max'] == 1 and r['auc_by_area'] == pytest.approx(.5)
    assert localisation_report(scores[:2], [0, 0], [True, True])['marked_reals'] is None


# --- bad input ---
@pytest.mark.parametrize('f', [auc, choose_threshold, evaluate, lambda a, b: auc_difference(a, a, b), lambda a, b: auc_per_method(a, b, b)])
@pytest.mark.parametrize('fid, lab, message', [
    ([.2, .9], [0, 1, 1], 'label: .*shape'), ([], [], '0 real and 0 fake'), ([.2, float('nan')], [0, 1], 'fidelity: holds NaN'),
    ([.2, .9], [1, 1], '2 real and 0 fake'), ([.2, .9], [0, 0], '0 real and 2 fake'), ([.2, .9], [0, 2], '2 at row 1'), ([.2, .9], ['real', 'fake'], 'label: give numbers'),
    ([.2, .9], [0, float('nan')], 'label: holds NaN'), ([[.2, .9]], [[0, 1]], 'fidelity: .*shape'), ([.2, .9], [[0], [1]], 'label: .*shape'),
])
def test_bad_scores(f, fid, lab, message):
    with pytest.raises(DeepfidError, match=message) as e: f(fid, lab)
    assert '\n' not in str(e.value)


def test_bad_groups_and_choices():
    fid, lab = scores(10)
    with pytest.raises(MetricError, match='groups: .*each of the 10'): evaluate(fid, lab, groups=range(9))
    with pytest.raises(MetricError, match='none missing'): evaluate(fid, lab, groups=['a', 'b', 'c', None]+['d']*6)
    with pytest.raises(DeepfidError, match="criterion='f1'"): choose_threshold(fid, lab, 'f1')


def test_masks_must_lie_between_zero_and_one():
    mask = np.zeros((8, 8)); mask[:4] = 1
    assert mask_iou(mask>0, mask)==mask_iou(mask.astype(np.uint8), mask>0)==mask_iou(mask*.9, mask)==1
    for bad in (mask*255, np.uint8(mask*255), mask-1, np.full((8, 8), np.nan), np.array([['1']*8]*8)):
        with pytest.raises(DeepfidError, match='^predicted mask: '): mask_iou(bad, mask)
        with pytest.raises(DeepfidError, match='^true mask: '): pixel_auc(mask, bad)


@pytest.mark.parametrize('wrong', [dict(threshold=float('nan')), dict(threshold='.5'), dict(level=95), dict(level=0), dict(level=float('nan')), dict(n_boot=1.5), dict(n_boot=-1), dict(n_boot=10**12), dict(seed=-1)])
def test_settings_out_of_range_are_named(wrong):
    (fid, lab), name = scores(), next(iter(wrong))
    with pytest.raises(DeepfidError, match=f'^{name}='): evaluate(fid, lab, **dict(n_boot=10)|wrong)
    if name=='threshold':
        with pytest.raises(DeepfidError, match='^threshold='): confusion_matrix(fid, lab, wrong['threshold'])
    else:
        with pytest.raises(DeepfidError, match=f'^{name}='): auc_interval(fid, lab, **dict(n_boot=10)|wrong)


def test_scores_as_text_are_refused():
    fid, lab = scores()
    for bad in ([str(f) for f in fid], np.array(fid).astype(str), [*map(str, fid[:1]), *fid[1:]]):
        with pytest.raises(DeepfidError, match='^fidelity: give numbers'): evaluate(bad, lab)
