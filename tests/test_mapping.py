"The mapping from quality to fidelity: bands, groups, states and the figure"
import json
import numpy as np, pandas as pd, pytest
from scipy.stats import spearmanr
from sklearn.base import clone
from deepfid.core import DeepfidError
from deepfid.quality.mapping import FidelityMapping, plot_mapping

METHODS = pytest.mark.parametrize('method', ['minmax', 'rank'])

@pytest.fixture
def rows():
    "Qualities, labels and forgers; each forger's fakes of another quality"
    rng = np.random.default_rng(0)
    real = np.arange(400) % 2 == 0
    forger = np.where(real, 'real', rng.choice(['swap', 'mouth', 'resynth'], 400))
    return rng.normal(size=400) - 5*(forger == 'mouth') + 3*(forger == 'swap'), real, forger

def raises(message, f, *args, **kw):
    with pytest.raises(DeepfidError, match=message) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


# -- two classes --
@METHODS
def test_bands_order_and_gap(method, rows):
    q, real, _ = rows
    f = FidelityMapping(method).fit_transform(q, real)
    assert 0 <= f[~real].min() < f[~real].max() <= .4 + 1e-12 and .6 - 1e-12 <= f[real].min() < f[real].max() <= 1
    for k in (True, False): assert spearmanr(q[real == k], f[real == k])[0] == pytest.approx(1)

@METHODS
def test_order_of_rows_does_not_matter(method):
    rng = np.random.default_rng(0)
    q, real = rng.normal(size=50).round(1), np.arange(50) % 2
    p = rng.permutation(50)
    m = FidelityMapping(method)
    np.testing.assert_array_equal(m.fit_transform(q, real)[p], m.fit_transform(q[p], real[p]))

@METHODS
@pytest.mark.parametrize('q, real, message', [
    ([1, np.nan, np.nan], [1, 0, 0], 'NaN'), ([1, np.inf], [1, 0], 'infinity'), (['a', 'b'], [1, 0], 'quality: give numbers'),
    ([1, 2], ['real', 'fake'], 'labels: give numbers'), ([1, 2], [1, 2], 'not 2'), ([1, 2], [1, np.nan], 'NaN'), ([1, 2], [None, 0], 'labels: give numbers'),
    ([1, 2], [1, 0, 1], '3 labels for 2')])
def test_bad_input(method, q, real, message): raises(message, FidelityMapping(method).fit, q, real)

@METHODS
def test_one_class_one_row_and_nothing(method):
    m = FidelityMapping(method).fit([1, 2, 3], True)
    assert m.transform(2, True) == pytest.approx(.8)
    raises('not fitted on fake', m.transform, [1, 2], [1, 0])
    raises('not fitted on real', FidelityMapping(method).transform, [1.], 1)
    raises('not fitted on real', FidelityMapping(method).fit([], []).transform, [1.], 1)
    assert FidelityMapping(method).fit_transform([3.], [0], ['a']) == pytest.approx([.2])
    np.testing.assert_array_equal(FidelityMapping(method, ((.1, .1), (.9, .9))).fit_transform([1, 2, 3], [0, 0, 1]), [.1, .1, .9])

@METHODS
def test_neighbouring_floats_and_huge_numbers(method):
    for q in ([1., np.nextafter(1., 2.)], [-1e300, 1e300], [0., 5e-324]):
        f = FidelityMapping(method).fit_transform(q, 0)
        assert np.isfinite(f).all() and 0 <= f[0] <= f[1] <= .4

def test_an_outlier_moves_ranks_by_one_only():
    q, real = np.r_[np.linspace(0, 1, 100), np.linspace(0, 1, 100)], np.r_[np.ones(100), np.zeros(100)]
    far_q, far_real = np.r_[q, -1e6], np.r_[real, 1]
    shift = {m: np.abs(FidelityMapping(m).fit(far_q, far_real).transform(q, real) - FidelityMapping(m).fit_transform(q, real)).max() for m in ('minmax', 'rank')}
    assert shift['rank'] < .4/100 + 1e-9 and shift['minmax'] > .39

def test_parameters_as_in_scikit_learn():
    m = clone(FidelityMapping('rank', overlap=True).fit([1, 2], [0, 1]))
    assert m.get_params() == dict(method='rank', bands=((0., .4), (.6, 1.)), overlap=True) and not hasattr(m, 'knots_')
    assert m.set_params(method='minmax').method == 'minmax' and "method='minmax'" in repr(m)
    raises('parameter', m.set_params, knots=3)


# -- groups --
@METHODS
def test_each_group_is_mapped_as_if_it_were_alone(method, rows):
    q, real, forger = rows
    f = FidelityMapping(method).fit_transform(q, real, forger)
    for g in np.unique(forger): np.testing.assert_array_equal(f[forger == g], FidelityMapping(method).fit_transform(q[forger == g], real[forger == g]))
    if method == 'minmax':
        for g in ('swap', 'mouth', 'resynth'): assert (f[forger == g].min(), f[forger == g].max()) == (0, .4)

@METHODS
def test_real_faces_may_have_groups_too(method, rows):
    q, real, _ = rows
    camera = np.where(np.arange(400) < 200, 'a', 'b')
    f = FidelityMapping(method).fit_transform(q + 9*(camera == 'b'), real, camera)
    for c in 'ab':
        for k, middle in ((True, .8), (False, .2)): assert abs(f[(camera == c) & (real == k)].mean() - middle) < .1

@METHODS
def test_mapping_without_groups(method, rows):
    q, real, forger = rows
    pooled, grouped = FidelityMapping(method).fit(q, real), FidelityMapping(method).fit(q, real, forger)
    np.testing.assert_array_equal(pooled.transform(q, real), grouped.transform(q, real))
    np.testing.assert_array_equal(FidelityMapping(method).fit_transform(q, real, 'all'), pooled.transform(q, real))
    assert set(pooled.to_dict()) == {'method', 'bands', 'knots'}

def test_unknown_groups(rows):
    q, real, forger = rows
    m = FidelityMapping().fit(q, real, forger)
    raises("fake faces of group 'diffusion', only of 'mouth', 'resynth', 'swap'", m.transform, [1.], 0, 'diffusion')
    raises("real faces of group 'swap'", m.transform, [1.], 1, 'swap')
    m.fit(q, real) # without groups
    raises('only of no group', m.transform, q, real, forger)

@METHODS
@pytest.mark.parametrize('groups, message', [
    (['a', 'b'], '2 groups for 3'), (['a', None, 'b'], 'not None'), (['a', np.nan, np.nan], 'not nan'), ([1., 2., 3.], 'not 1.0'),
    ([True, False, True], 'not True'), ([], '0 groups for 3'), (pd.Series(['a', pd.NA, 'b']), 'not nan')])
def test_bad_groups(method, groups, message):
    m = FidelityMapping(method)
    raises(message, m.fit, [1, 2, 3], [0, 0, 1], groups)
    raises(message, m.fit([1, 2, 3], [0, 0, 1], 'all').transform, [1, 2, 3], [0, 0, 1], groups)

@METHODS
def test_forms_of_groups(method):
    q, real = [1., 2, 3, 4], [0, 0, 0, 0]
    want = FidelityMapping(method).fit_transform(q, real, ['1', '1', '', ''])
    for groups in ([1, 1, '', ''], np.array(['1', '1', '', '']), pd.Series(['1', '1', '', ''], index=[7, 5, 3, 1]), pd.Categorical(['1', '1', '', '']), np.array([1, 1, '', ''], object)):
        np.testing.assert_array_equal(FidelityMapping(method).fit_transform(q, real, groups), want)
    m = FidelityMapping(method).fit(q, real, np.array([1, 1, 2, 2]))
    np.testing.assert_array_equal(m.transform(np.reshape(q, (2, 2)), 0, [[1, 1], [2, 2]]).ravel(), want)
    assert m.transform(1.5, 0, 1).shape == () and m.transform([], 0, []).shape == (0,)

@METHODS
def test_a_failed_fit_leaves_the_old_one(method, rows):
    q, real, forger = rows
    m = FidelityMapping(method).fit(q, real, forger)
    before = m.to_dict()
    raises('NaN', m.fit, np.where(np.arange(400) == 3, np.nan, q), real, forger)
    raises('5 groups', m.fit, q, real, forger[:5])
    assert m.to_dict() == before

@METHODS
def test_small_and_flat_groups(method):
    f = FidelityMapping(method).fit_transform([1, 2, 7, 7, 7, 3, 9], [0, 0, 0, 0, 0, 1, 1], ['a', 'a', 'b', 'b', 'b', 'c', 'd'])
    np.testing.assert_allclose(f[2:], [.2, .2, .2, .8, .8]) # all equal, or alone: the middle
    assert f[0] < .2 < f[1]

@METHODS
def test_beyond_what_a_group_was_fitted_on(method):
    m = FidelityMapping(method).fit([0, 1, 10, 11], 0, ['a', 'a', 'b', 'b'])
    np.testing.assert_array_equal(m.transform([99, -99], 0, ['a', 'b']), m.transform([1, 10], 0, ['a', 'b']))


# -- bands --
@pytest.mark.parametrize('bands, message', [
    (((0, .6), (.4, 1)), 'overlap=True'), (((0, 1), (0, 1)), 'overlap=True'), (((.6, 1), (0, .4)), 'fake lies below'), (((.2, .3), (.1, 1)), 'fake lies below'),
    (((.4, 0), (.6, 1)), 'low <= high'), (((0, .4), (1, .6)), 'low <= high'), (((-.1, .4), (.6, 1)), 'from 0 to 1'), (((0, .4), (.6, 1.01)), 'from 0 to 1'),
    (((0, .4), (.6, np.inf)), 'infinity'), (((0, .4), (.6, 'wide')), 'bands: give numbers'), ((0, .4, .6, 1), 'bands: give numbers'), (None, 'bands')])
def test_bad_bands(bands, message):
    raises(message, FidelityMapping(bands=bands).fit, [1, 2], [0, 1])
    if 'overlap' not in message: raises(message, FidelityMapping(bands=bands, overlap=True).fit, [1, 2], [0, 1])

def test_unknown_method(): raises("method='x'", FidelityMapping('x').fit, [1, 2], [0, 1])

def test_overlap_on_request(rows):
    q, real, _ = rows
    f = FidelityMapping('rank', ((0, 1), (0, 1)), overlap=True).fit_transform(q, real)
    assert 0 <= f.min() < .01 and .99 < f.max() <= 1
    FidelityMapping(bands=((0, .5), (.5, 1))).fit(q, real) # touching is not overlapping

@METHODS
@pytest.mark.parametrize('bands', [((.1, .2), (.3, .95)), ((0, 0), (1, 1)), ((.5, .5), (.5, .5))])
def test_targets_stay_in_their_band_and_rise(method, bands, rows):
    q, real, forger = rows
    for groups in (None, forger):
        f = FidelityMapping(method, bands).fit_transform(q, real, groups)
        for k, (low, high) in zip((False, True), bands): assert low - 1e-12 <= f[real == k].min() and f[real == k].max() <= high + 1e-12
        for g in np.unique(forger): assert (np.diff(f[forger == g][q[forger == g].argsort()]) >= 0).all()


# -- states --
@METHODS
def test_json_with_groups(method, rows):
    q, real, forger = rows
    m = FidelityMapping(method, ((0, .45), (.4, 1)), overlap=True).fit(q, real, forger)
    state = json.loads(json.dumps(m.to_dict()))
    again = FidelityMapping.from_dict(state)
    assert again.to_dict() == state and again.get_params() == m.get_params()
    for groups in (None, forger): np.testing.assert_array_equal(again.transform(q, real, groups), m.transform(q, real, groups))

def test_states_from_before_there_were_groups():
    old = dict(method='minmax', bands=[[0., .4], [.6, 1.]], knots=dict(fake=[[-20., -2.], [0., 1.]], real=[[-18., -2.], [0., 1.]]))
    m = FidelityMapping.from_dict(old)
    np.testing.assert_allclose(m.transform([-20, -2, -10], [0, 1, 1]), [0, 1, .8])
    assert m.to_dict() == old and not m.overlap
    raises('only of no group', m.transform, [-3.], 0, 'swap')
    assert FidelityMapping.from_dict({**old, 'bands': [[0, .7], [.3, 1]]}).overlap # once this was allowed without a request
    assert not hasattr(FidelityMapping.from_dict({**old, 'knots': {}}), 'knots_')

@pytest.mark.parametrize('change', [dict(groups=g) for g in (3, dict(fake=3), dict(fake=dict(a=[[1, 2], [0]])), dict(fake=dict(a=[[2, 1], [0, 1]])), dict(other=dict(a=[[1], [0]])),
        dict(fake=dict(a=[[1, None], [0, 1]])), dict(fake={}), dict(fake=dict(a=[[1, 2], [0, 3]])), None)] +
    [dict(knots=k) for k in (dict(real=[[1, 0], [0, 1]]), dict(other=[[1], [1]]), dict(real=[[1, 2], [0]]), [], dict(real=[[0, None], [0, 1]]))] + [dict(bands=3)])
def test_bad_state(change):
    state = FidelityMapping().fit([1, 2, 3], [0, 0, 1], 'a').to_dict()
    raises('not the state', FidelityMapping.from_dict, {**state, **change})
    raises('not the state', FidelityMapping.from_dict, None)


# -- the figure --
def test_plot_mapping(rows):
    q, real, forger = rows
    m = FidelityMapping().fit(q, real, forger)
    assert [ax.get_title() for ax in plot_mapping(q, real, m, forger).axes] == ['quality', 'fidelity, minmax']
    several = plot_mapping(q, real, dict(a=m, b=FidelityMapping('rank').fit(q, real)), forger)
    assert [ax.get_title() for ax in several.axes] == ['quality', 'a', 'b']
    filled = lambda ax: sum(p.get_height() > 0 for p in ax.patches if p.get_width() < .03)
    assert filled(several.axes[2]) >= 40 # ranks fill both bands: 2 x 20 of 50 bins
    raises('labels for', plot_mapping, q, real[:3], m)
