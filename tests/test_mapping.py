"The mapping from quality to fidelity: groups, bands, states, and the picture"
import json, subprocess, sys
import numpy as np, pandas as pd, pytest
from sklearn.base import clone
from deepfid.core import DeepfidError
from deepfid.quality.mapping import FidelityMapping, mapping_figure

METHODS = pytest.mark.parametrize('method', ['minmax', 'rank'])

@pytest.fixture
def rows():
    "Qualities, labels and forgers; each forger's fakes of another quality"
    rng = np.random.default_rng(0)
    real = np.arange(400) % 2 == 0
    forger = np.where(real, 'real', rng.choice(['swap', 'mouth', 'resynth'], 400))
    return rng.normal(size=400) - 5*(forger == 'mouth') + 3*(forger == 'swap'), real, forger

def refuses(says, f, *args, **kw):
    with pytest.raises(DeepfidError, match=says) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


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
def test_without_groups_nothing_changed(method, rows):
    q, real, forger = rows
    plain, grouped = FidelityMapping(method).fit(q, real), FidelityMapping(method).fit(q, real, forger)
    np.testing.assert_array_equal(plain.transform(q, real), grouped.transform(q, real))
    np.testing.assert_array_equal(FidelityMapping(method).fit_transform(q, real, 'all'), plain.transform(q, real))
    assert set(plain.to_dict()) == {'method', 'bands', 'knots'}

def test_strange_groups(rows):
    q, real, forger = rows
    m = FidelityMapping().fit(q, real, forger)
    refuses("no fake faces of group 'diffusion' were fitted, only of 'mouth', 'resynth', 'swap'", m.transform, [1.], 0, 'diffusion')
    refuses("no real faces of group 'swap'", m.transform, [1.], 1, 'swap')
    refuses('without groups', FidelityMapping().fit(q, real).transform, q, real, forger)
    m.fit(q, real) # forgets them
    refuses('without groups', m.transform, q, real, forger)

@METHODS
@pytest.mark.parametrize('groups, says', [
    (['a', 'b'], '2 groups for 3'), (['a', None, 'b'], 'first is None'), (['a', np.nan, np.nan], '2 of 3'), ([1., 2., 3.], 'first is 1.0'),
    ([True, False, True], 'first is True'), ([], '0 groups for 3'), (pd.Series(['a', pd.NA, 'b']), '1 of 3')])
def test_bad_groups(method, groups, says):
    m = FidelityMapping(method)
    refuses(says, m.fit, [1, 2, 3], [0, 0, 1], groups)
    refuses(says, m.fit([1, 2, 3], [0, 0, 1], 'all').transform, [1, 2, 3], [0, 0, 1], groups)

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
def test_a_refused_fit_leaves_groups(method, rows):
    q, real, forger = rows
    m = FidelityMapping(method).fit(q, real, forger)
    before = m.to_dict()
    refuses('1 of 400', m.fit, np.where(np.arange(400) == 3, np.nan, q), real, forger)
    refuses('5 groups', m.fit, q, real, forger[:5])
    assert m.to_dict() == before


# -- what is odd --
@METHODS
def test_small_and_flat_groups(method):
    f = FidelityMapping(method).fit_transform([1, 2, 7, 7, 7, 3, 9], [0, 0, 0, 0, 0, 1, 1], ['a', 'a', 'b', 'b', 'b', 'c', 'd'])
    np.testing.assert_allclose(f[2:], [.2, .2, .2, .8, .8]) # all equal, or alone: the middle
    assert f[0] < .2 < f[1]

@METHODS
def test_one_row_and_one_class(method):
    assert FidelityMapping(method).fit_transform([3.], [0], ['a']) == pytest.approx([.2])
    assert FidelityMapping(method).fit_transform([3.], [1]) == pytest.approx([.8])
    refuses('without real', FidelityMapping(method).fit([1, 2], 0, ['a', 'b']).transform, [1.], 1, 'a')
    np.testing.assert_array_equal(FidelityMapping(method, ((.1, .1), (.9, .9))).fit_transform([1, 2, 3], [0, 0, 1]), [.1, .1, .9])

@METHODS
def test_nan_is_refused_when_fitting_and_when_placing(method):
    refuses('1 of 3', FidelityMapping(method).fit, [1, np.nan, 3], [0, 0, 1], 'a')
    refuses('1 of 2', FidelityMapping(method).fit([1, 2, 3], [0, 0, 1]).transform, [1, np.nan], [0, 1])

@METHODS
def test_beyond_what_a_group_was_fitted_on(method):
    m = FidelityMapping(method).fit([0, 1, 10, 11], 0, ['a', 'a', 'b', 'b'])
    np.testing.assert_array_equal(m.transform([99, -99], 0, ['a', 'b']), m.transform([1, 10], 0, ['a', 'b']))

@METHODS
def test_neighbouring_floats_and_huge_numbers(method):
    for q in ([1., np.nextafter(1., 2.)], [-1e300, 1e300], [0., 5e-324]):
        f = FidelityMapping(method).fit_transform(q, 0)
        assert np.isfinite(f).all() and 0 <= f[0] <= f[1] <= .4


# -- bands --
@pytest.mark.parametrize('bands, says', [
    (((0, .6), (.4, 1)), 'overlap=True'), (((0, 1), (0, 1)), 'overlap=True'), (((.6, 1), (0, .4)), 'upside down'), (((.2, .3), (.1, 1)), 'upside down'),
    (((.4, 0), (.6, 1)), 'low <= high'), (((0, .4), (1, .6)), 'low <= high'), (((-.1, .4), (.6, 1)), '0 <= low'), (((0, .4), (.6, 1.01)), 'high <= 1'),
    (((0, .4), (.6, np.inf)), 'two pairs'), (((0, .4), (.6, None)), 'two pairs'), ((0, .4, .6, 1), 'two pairs'), (None, 'two pairs')])
def test_bands_that_are_refused(bands, says):
    refuses(says, FidelityMapping(bands=bands).fit, [1, 2], [0, 1])
    if 'overlap' not in says: refuses(says, FidelityMapping(bands=bands, overlap=True).fit, [1, 2], [0, 1])

def test_overlap_on_request(rows):
    q, real, _ = rows
    f = FidelityMapping('rank', ((0, 1), (0, 1)), overlap=True).fit_transform(q, real)
    assert 0 <= f.min() < .01 and .99 < f.max() <= 1
    FidelityMapping(bands=((0, .5), (.5, 1))).fit(q, real) # touching is not overlapping

@METHODS
@pytest.mark.parametrize('bands', [((0, .4), (.6, 1)), ((.1, .2), (.3, .95)), ((0, 0), (1, 1)), ((.5, .5), (.5, .5))])
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
    refuses('no fake faces', again.transform, [1.], 0, 'x')
    assert not hasattr(clone(again), 'groups_')

def test_states_from_before_there_were_groups():
    old = dict(method='minmax', bands=[[0., .4], [.6, 1.]], knots=dict(fake=[[-20., -2.], [0., 1.]], real=[[-18., -2.], [0., 1.]]))
    m = FidelityMapping.from_dict(old)
    np.testing.assert_allclose(m.transform([-20, -2, -10], [0, 1, 1]), [0, 1, .8])
    assert m.to_dict() == old and not m.overlap
    refuses('without groups', m.transform, [-3.], 0, 'swap')
    assert FidelityMapping.from_dict({**old, 'bands': [[0, .7], [.3, 1]]}).overlap # once this was allowed without asking
    assert not hasattr(FidelityMapping.from_dict({**old, 'knots': {}}), 'knots_')

@pytest.mark.parametrize('groups', [3, dict(fake=3), dict(fake=dict(a=[[1, 2], [0]])), dict(fake=dict(a=[[2, 1], [0, 1]])), dict(other=dict(a=[[1], [0]])),
                                    dict(fake=dict(a=[[1, None], [0, 1]])), dict(fake={}), dict(fake=dict(a=[[1, 2], [0, 3]])), None])
def test_damaged_groups(groups):
    state = FidelityMapping().fit([1, 2, 3], [0, 0, 1], 'a').to_dict()
    refuses('not the state', FidelityMapping.from_dict, {**state, 'groups': groups})


# -- the picture --
def test_mapping_figure(rows):
    q, real, forger = rows
    m = FidelityMapping().fit(q, real, forger)
    fig = mapping_figure(q, real, m, forger)
    assert [ax.get_title() for ax in fig.axes] == ['quality', 'fidelity, minmax']
    several = mapping_figure(q, real, dict(a=m, b=FidelityMapping('rank').fit(q, real), c=m), forger)
    assert [ax.get_title() for ax in several.axes] == ['quality', 'a', 'b', 'c']
    filled = lambda ax: sum(p.get_height() > 0 for p in ax.patches if p.get_width() < .03)
    assert filled(several.axes[2]) >= 40 # ranks fill both bands: 2 x 20 of 50 bins
    one = mapping_figure(q[real], real[real], FidelityMapping().fit(q, real))
    assert len(one.axes[1].get_legend().get_texts()) == 1
    refuses('labels for', mapping_figure, q, real[:3], m)

def test_the_room_stays_light():
    code = 'import sys, deepfid.quality.mapping; print(*(m for m in ("matplotlib", "ipywidgets", "torch", "fastai") if m in sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == []
