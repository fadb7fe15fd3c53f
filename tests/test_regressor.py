"Support vector regression: fast scores, subsets, approximate kernels, files, and the layer for a network"
import json, subprocess, sys, warnings

import numpy as np, pytest, torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_approximation import Nystroem
from sklearn.svm import SVR, LinearSVR
from sklearn.utils.estimator_checks import check_estimator, check_regressors_train
from safetensors.numpy import load_file, save_file

from deepfid.core import DeepfidError, WeightsError
from deepfid.models.deepfidelity.regressor import KERNEL_MAPS, ApproxRegressor, FidelityRegressor, RegressorError, benchmark_predict, rbf_kernel, resolve_gamma, load_regressor, stratified_rows

pytestmark = pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')

def problem(n, seed=0, dims=6):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n,dims))
    return X, np.where(X[:,0]*X[:,1]>0, .8, .2) + .1*np.tanh(X[:,2]) + rng.normal(0, .02, n)

X,y = problem(300)
Z,_ = problem(120, 1)
KINDS = {'exact': FidelityRegressor(scale=True), 'nystroem': ApproxRegressor('nystroem', 80, scale=True), 'fourier': ApproxRegressor('fourier', 80)}

@pytest.fixture(scope='module')
def fitted(): return {k: clone(r).fit(X, y) for k,r in KINDS.items()}

def test_kernel():
    A,B = np.random.default_rng(0).normal(size=(2,5,4))
    want = [[np.exp(-.3*((a-b)**2).sum()) for b in B] for a in A]
    np.testing.assert_allclose(rbf_kernel(A, B, .3), want, atol=1e-12)

def test_scikit_learn_is_imported_for_fitting_only(fitted, tmp_path):
    "A saved regressor scores without scikit-learn and SciPy"
    fitted['exact'].save(tmp_path); np.save(tmp_path/'z.npy', Z)
    code = f"""
import sys, numpy as np
from deepfid.models.deepfidelity.regressor import load_regressor
load_regressor({str(tmp_path)!r}).predict(np.load({str(tmp_path/'z.npy')!r}))
sys.exit(int(any(m in sys.modules for m in ('sklearn', 'scipy'))))"""
    assert subprocess.run([sys.executable, '-c', code]).returncode==0

# -- fast scores ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(C=10, epsilon=.02), dict(gamma='auto'), dict(gamma=.3)])
def test_settings_are_those_of_scikit_learn(kw):
    np.testing.assert_allclose(FidelityRegressor(**kw).fit(X, y).predict(Z), SVR(**kw).fit(X, y).predict(Z), atol=1e-9, rtol=0)

def test_standardised():
    scale = np.array([1,9,1,1,1e3,1])
    a,b = FidelityRegressor(scale=True).fit(X, y),FidelityRegressor(scale=True).fit(X*scale+5, y)
    np.testing.assert_allclose(a.predict(Z), b.predict(Z*scale+5), atol=1e-6)

@pytest.mark.parametrize('dtype,tol', [('float64',1e-9), ('float32',1e-4)])
@pytest.mark.parametrize('offset', [0, 300])
def test_scores_are_those_of_scikit_learn(dtype, tol, offset):
    svr = SVR().fit(X+offset, y)
    theirs,ours = svr.predict(Z+offset),FidelityRegressor().fit(X+offset, y).predict(Z+offset, dtype=dtype)
    assert ours.dtype==np.float64
    np.testing.assert_allclose(ours, theirs, atol=tol, rtol=0)
    assert dtype=='float64' or abs(ours-theirs).max()>1e-9 # that float32 was really used

@pytest.mark.parametrize('kind', KINDS)
def test_batches_do_not_matter(fitted, kind):
    for dtype,tol in dict(float64=1e-12, float32=1e-5).items():
        want = fitted[kind].predict(Z, dtype=dtype)
        for b in (1, 7, 119, 10**9): np.testing.assert_allclose(fitted[kind].predict(Z, batch_size=b, dtype=dtype), want, atol=tol, rtol=0)

def test_chunks_do_not_matter(fitted, monkeypatch):
    want = fitted['exact'].predict(Z)
    monkeypatch.setattr('deepfid.models.deepfidelity.regressor._KERNEL_CHUNK', 10)
    np.testing.assert_allclose(fitted['exact'].predict(Z), want, atol=1e-12)

@pytest.mark.parametrize('kw', [dict(gamma=1e6), dict(C=1e9, epsilon=0, max_iter=100_000)])
def test_float32_is_not_used_where_it_would_be_wrong(kw):
    reg = FidelityRegressor(**kw).fit(X, y)
    assert reg.float32_error()>1e-4
    np.testing.assert_array_equal(reg.predict(Z, dtype='float32'), reg.predict(Z))

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('kw', [dict(), dict(C=100.), dict(gamma=20.), dict(gamma=.001, C=30.)])
def test_float32_keeps_its_promise(kw, seed):
    X,y = problem(300, seed, 20)
    reg = FidelityRegressor(**kw).fit(X*3+50, y)
    far = np.r_[X, 10*X, 0*X]*3+50
    np.testing.assert_allclose(reg.predict(far, dtype='float32'), reg.predict(far), atol=1e-4, rtol=0)

@pytest.mark.parametrize('order', ['by turns','sorted'])
def test_long_sums_of_either_sign(order):
    "Thousands of equal terms of one sign, then (or, in every second lane of the processor) the other"
    rng,n = np.random.default_rng(0),8000
    reg = FidelityRegressor().fit(X, y)
    sign = np.arange(n)%2 if order=='by turns' else np.arange(n)>=n/2
    reg.support_vectors_,reg.dual_coef_,reg._forms = rng.normal(size=(n,6)),sign-.5,{}
    want = reg.predict(Z)
    np.testing.assert_allclose(reg.predict(Z, dtype='float32'), want, atol=1e-4, rtol=0)
    assert abs(reg.predict(Z, dtype='float32')-want).max()>1e-8
    np.testing.assert_allclose(reg.to_module()(torch.tensor(Z, dtype=torch.float32)), want, atol=1e-4, rtol=0)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', ['float64','float32'])
def test_wild_rows_get_a_score(fitted, kind, dtype):
    wild = np.r_[1e20*Z[:3], 1e300*Z[:3], np.full((1,6),1.7e308)]
    with warnings.catch_warnings(action='error'):
        scores = fitted[kind].predict(wild, dtype=dtype)
    assert np.isfinite(scores).all()
    if kind!='fourier': np.testing.assert_allclose(scores, fitted[kind].intercept_)

def test_no_support_vector_at_all(tmp_path):
    reg = FidelityRegressor(epsilon=2.).fit(X, y)
    assert len(reg.support_)==0
    reg.save(tmp_path)
    for r in (reg, load_regressor(tmp_path)): np.testing.assert_allclose(r.predict(Z), reg.intercept_)
    np.testing.assert_allclose(reg.to_module()(torch.tensor(Z[:4]).float()), reg.intercept_, atol=1e-6)

def test_refit_forgets(fitted):
    reg = clone(KINDS['exact']).fit(X, y); reg.predict(Z); reg.predict(Z, dtype='float32')
    reg.fit(X[:100], y[:100])
    fresh = clone(KINDS['exact']).fit(X[:100], y[:100])
    for dtype in ('float64','float32'): np.testing.assert_array_equal(reg.predict(Z, dtype=dtype), fresh.predict(Z, dtype=dtype))

def test_a_failed_refit_leaves_nothing_to_predict_with(fitted):
    reg = clone(KINDS['exact']).fit(X, y).set_params(C=-1)
    with pytest.raises(RegressorError, match='C=-1'): reg.fit(X, y)
    with pytest.raises(NotFittedError): reg.predict(Z)

def test_scikit_learns_own_is_taken_over():
    svr = SVR(C=3, epsilon=.05).fit(X, y)
    reg = FidelityRegressor.from_svr(svr)
    np.testing.assert_allclose(reg.predict(Z), svr.predict(Z), atol=1e-9)
    assert (reg.C,reg.epsilon,reg.support_.tolist())==(3,.05,svr.support_.tolist())
    with pytest.raises(DeepfidError, match='linear'): FidelityRegressor.from_svr(SVR(kernel='linear').fit(X, y))
    with pytest.raises(NotFittedError): FidelityRegressor.from_svr(SVR())

def test_benchmark_is_what_it_says():
    b = benchmark_predict(rows=300, dims=100, vectors=200, repeats=3)
    assert b['vectors']==200 and {k: len(t) for k,t in b['times'].items()}=={'scikit-learn': 3, 'float64': 3, 'float32': 3}
    assert b['error']['float64']<1e-9<b['error']['float32']<1e-4 and b['spread']>.01
    for k in ('float64','float32'): assert b['speedup'][k]==pytest.approx(np.median(b['times']['scikit-learn'])/np.median(b['times'][k]))

@pytest.mark.slow
def test_fast_enough():
    b = benchmark_predict(repeats=3)
    assert b['vectors']==5000 and b['error']['float64']<1e-6 and b['error']['float32']<1e-4
    assert b['speedup']['float64']>=15 and b['speedup']['float32']>=30

# -- subsets and kernel width -----------------------------------------------------------------------------

def test_rows_are_picked_in_proportion():
    t = np.r_[np.full(700,.1), np.full(300,.9)]
    rows = stratified_rows(t, 100, 3)
    assert len(set(rows))==100 and (t[rows]<.5).sum()==70 and (np.diff(rows)>0).all()
    np.testing.assert_array_equal(rows, stratified_rows(t, 100, 3))
    assert rows.tolist()!=stratified_rows(t, 100, 4).tolist()

@pytest.mark.parametrize('fake', [1, 2, 500, 998, 999])
@pytest.mark.parametrize('n', [2, 3, 10, 999, 1000])
def test_neither_side_is_left_out(fake, n):
    t = np.r_[np.full(fake,.1), np.full(1000-fake,.9)]
    rows = stratified_rows(t, n)
    assert len(set(rows))==n and 0<(rows<fake).sum()<n

def test_one_sided_targets_can_be_picked_from():
    assert len(stratified_rows(np.full(50,.9), 7))==len(stratified_rows(np.full(50,.1), 7))==7

@pytest.mark.parametrize('kind', KINDS)
def test_max_rows(kind):
    few = clone(KINDS[kind]).set_params(max_rows=100, random_state=5)
    a,b = clone(few).fit(X, y),clone(few).fit(X, y)
    np.testing.assert_array_equal(a.predict(Z), b.predict(Z))
    assert a.predict(Z).tolist()!=few.set_params(random_state=6).fit(X, y).predict(Z).tolist()
    np.testing.assert_array_equal(clone(KINDS[kind]).set_params(max_rows=300).fit(X, y).predict(Z), clone(KINDS[kind]).fit(X, y).predict(Z))
    if kind!='fourier':
        assert set(a.support_)<=set(stratified_rows(y, 100, 5)) and len(a.support_vectors_)<=100
        np.testing.assert_allclose(a.support_vectors_, ((X-a.mean_)/a.std_)[a.support_])

@pytest.mark.parametrize('gamma', ['scale','auto',.07])
def test_gamma_is_one_thing(gamma):
    X_ = X*[1,2,3,4,5,6]+[9,0,0,1,0,-5]
    want = SVR(gamma=gamma).fit(X_, y)._gamma
    regs = [FidelityRegressor(gamma=gamma, max_rows=m) for m in (None,90)]+[ApproxRegressor(k, 50, gamma=gamma) for k in KERNEL_MAPS]
    for reg in regs: assert reg.fit(X_, y).gamma_==pytest.approx(want, rel=1e-12)
    assert resolve_gamma(X_, gamma)==pytest.approx(want, rel=1e-12)

# -- approximate kernels --------------------------------------------------------------------------------------------

def test_nystroem_is_scikit_learns():
    reg = ApproxRegressor('nystroem', 60, random_state=2).fit(X, y)
    ny = Nystroem(gamma=reg.gamma_, n_components=60, random_state=2)
    svr = LinearSVR(C=1., epsilon=.1, tol=1e-3, max_iter=1000, random_state=2).fit(ny.fit_transform(X-X.mean(0)), y)
    np.testing.assert_allclose(reg.predict(Z), svr.predict(ny.transform(Z-X.mean(0))), atol=1e-6)

def test_fourier_features_to_the_letter(fitted):
    r = fitted['fourier']
    want = np.cos((Z-r.mean_)/r.std_@r.frequencies_ + r.phases_)@r.amplitudes_ + r.intercept_
    np.testing.assert_allclose(r.predict(Z), want, atol=1e-10)

@pytest.mark.parametrize('kernel_map,components,off', [('nystroem',300,.02), ('fourier',1000,.08)])
def test_enough_components_give_the_exact_scores(kernel_map, components, off):
    X,y = problem(components)
    exact = FidelityRegressor(tol=1e-5).fit(X, y).predict(Z)
    approx = ApproxRegressor(kernel_map, components, max_iter=300 if kernel_map=='fourier' else 20_000, tol=1e-5).fit(X, y).predict(Z)
    assert np.sqrt(np.mean((approx-exact)**2))<off
    few = ApproxRegressor(kernel_map, 5).fit(X, y).predict(Z)
    assert np.sqrt(np.mean((few-exact)**2))>2*off

@pytest.mark.parametrize('kernel_map', KERNEL_MAPS)
def test_features_far_from_zero_do_not_matter(kernel_map):
    a,b = (ApproxRegressor(kernel_map, 60).fit(X+o, y).predict(Z+o, dtype='float32') for o in (0,1e4))
    np.testing.assert_allclose(a, b, atol=1e-3)

@pytest.mark.parametrize('kernel_map', KERNEL_MAPS)
def test_scikit_learn_checks(kernel_map):
    "Its rows are few, so components must be; then its R2 is out of reach, and checked with more"
    failed = {c['check_name'] for c in check_estimator(ApproxRegressor(kernel_map, 8, two_classes=False), on_fail=None, on_skip=None) if c['status']=='failed'}
    assert failed<={'check_regressors_train'}
    check_regressors_train('ApproxRegressor', ApproxRegressor(kernel_map, 150, two_classes=False, gamma=.02, C=10))

def test_scikit_learn_checks_of_a_subset():
    assert not [c for c in check_estimator(FidelityRegressor(two_classes=False, max_rows=60), on_fail=None, on_skip=None) if c['status']=='failed']

# -- bad input ------------------------------------------------------------------------------------------------------

BAD = [(dict(max_rows=1), 'max_rows=1'), (dict(max_rows=2.5), 'max_rows=2.5'), (dict(max_rows=0), 'max_rows=0'), (dict(random_state=-1), 'random_state'),
    (dict(random_state=np.random.RandomState(0)), 'random_state'), (dict(gamma='wide'), "gamma='wide'"), (dict(gamma=0.), 'gamma'), (dict(gamma=None), 'gamma'),
    (dict(C=0.), 'C=0.0'), (dict(C='1'), "C='1'"), (dict(epsilon=-1.), 'epsilon=-1.0'), (dict(epsilon=np.nan), 'epsilon=nan')]

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kw,says', BAD)
def test_bad_settings(kind, kw, says):
    with pytest.raises(RegressorError, match=says) as e: clone(KINDS[kind]).set_params(**kw).fit(X, y)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('kw,says', [(dict(kernel_map='sigmoid'), 'sigmoid'), (dict(kernel_map=None), 'kernel_map=None'), (dict(components=0), 'components=0'),
    (dict(components=2.), 'components=2.0'), (dict(components=301), 'at least 301'), (dict(components=50, max_rows=49), 'max_rows=49')])
def test_bad_maps(kw, says):
    with pytest.raises(RegressorError, match=says): ApproxRegressor(**kw).fit(X, y)

@pytest.mark.parametrize('kind', KINDS)
def test_bad_rows(kind):
    fit = clone(KINDS[kind]).fit
    with pytest.raises(RegressorError, match='NaN'): fit(np.where(X>2, np.nan, X), y)
    with pytest.raises(RegressorError, match='NaN'): fit(X, np.where(y>.8, np.nan, y))
    with pytest.raises(RegressorError, match='equal'): fit(np.ones((100,3)), y[:100])
    for side in (y>.5, y<.5):
        with pytest.raises(RegressorError, match='one side of 0.5'): fit(X[side], y[side])
    for bad in ((X[:1], y[:1]), (X, y[:-1])):
        with pytest.raises(RegressorError): fit(*bad)
    with pytest.raises(RegressorError) as e: fit(X[0], y)
    assert '\n' not in str(e.value)

def test_bad_requests(fitted):
    for r in fitted.values():
        with pytest.raises(DeepfidError, match='float16'): r.predict(Z, dtype='float16')
        with pytest.raises(DeepfidError, match='batch_size=0'): r.predict(Z, batch_size=0)
        with pytest.raises(RegressorError, match='NaN'): r.predict(np.where(Z>1, np.nan, Z))
        with pytest.raises(RegressorError, match='features'): r.predict(Z[:,:3])
        with pytest.raises(DeepfidError, match='int8'): r.to_module(torch.int8)
    with pytest.raises(NotFittedError): ApproxRegressor().predict(Z)
    with pytest.raises(NotFittedError): ApproxRegressor('fourier').to_module()

def test_refused_before_time_is_spent(monkeypatch):
    def never(*args, **kw): raise AssertionError('the solver was started')
    for solver in (SVR, LinearSVR, Nystroem): monkeypatch.setattr(solver, 'fit', never)
    for kind in KINDS.values():
        for kw,_ in BAD:
            with pytest.raises(RegressorError): clone(kind).set_params(**kw).fit(X, y)
        with pytest.raises(RegressorError): clone(kind).fit(X, abs(y)+.6)

# -- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype,tol', [('float64',1e-12), ('float32',1e-4)])
def test_round_trip(fitted, kind, dtype, tol, tmp_path):
    fitted[kind].save(tmp_path, dtype)
    again = load_regressor(tmp_path)
    assert type(again) is type(fitted[kind]) and again.get_params()==fitted[kind].get_params()
    np.testing.assert_allclose(again.predict(Z), fitted[kind].predict(Z), atol=tol, rtol=0)
    np.testing.assert_allclose(type(again).load(tmp_path).to_module(torch.float64)(torch.tensor(Z)), again.predict(Z), atol=1e-9)
    with pytest.raises(DeepfidError, match='float16'): again.save(tmp_path, 'float16')

def test_the_other_kind_is_refused(fitted, tmp_path):
    fitted['nystroem'].save(tmp_path)
    with pytest.raises(WeightsError, match='deepfid.FidelityRegressor'): FidelityRegressor.load(tmp_path)
    fitted['exact'].save(tmp_path)
    with pytest.raises(WeightsError, match='deepfid.ApproxRegressor'): ApproxRegressor.load(tmp_path)

def test_files_of_before_are_read(fitted, tmp_path):
    "Without the settings that came later"
    fitted['exact'].save(tmp_path)
    about = json.loads((tmp_path/'regressor.json').read_text())
    del about['config']['max_rows'],about['config']['random_state']
    (tmp_path/'regressor.json').write_text(json.dumps(about))
    np.testing.assert_array_equal(FidelityRegressor.load(tmp_path).predict(Z), fitted['exact'].predict(Z))

@pytest.mark.parametrize('text', ['', '[]', 'null', '{}', '{"format": ["x"]}', '{"format": "deepfid.ApproxRegressor", "version": 2}',
    '{"format": "deepfid.ApproxRegressor", "version": 1}'])
def test_broken_json(fitted, tmp_path, text):
    fitted['fourier'].save(tmp_path)
    (tmp_path/'regressor.json').write_text(text)
    with pytest.raises(WeightsError, match='regressor.json') as e: load_regressor(tmp_path)
    assert '\n' not in str(e.value)

def test_missing_or_flipped(fitted, tmp_path):
    fitted['fourier'].save(tmp_path)
    path = tmp_path/'regressor.safetensors'
    data = bytearray(path.read_bytes()); data[-3] ^= 4; path.write_bytes(data)
    with pytest.raises(WeightsError, match='sha256'): load_regressor(tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match='regressor.safetensors: no such file'): load_regressor(tmp_path)
    with pytest.raises(WeightsError, match='nowhere'): load_regressor(tmp_path/'nowhere')

def test_unknown_setting(fitted, tmp_path):
    fitted['exact'].save(tmp_path)
    about = json.loads((tmp_path/'regressor.json').read_text()); about['config']['run'] = 'me'
    (tmp_path/'regressor.json').write_text(json.dumps(about))
    with pytest.raises(WeightsError, match='run'): FidelityRegressor.load(tmp_path)

def test_unfitted_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError): FidelityRegressor().save(tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('kernel_map', ['sigmoid','nystroem'])
def test_another_map_in_the_settings(fitted, tmp_path, kernel_map):
    fitted['fourier'].save(tmp_path)
    about = json.loads((tmp_path/'regressor.json').read_text()); about['config']['kernel_map'] = kernel_map
    (tmp_path/'regressor.json').write_text(json.dumps(about))
    with pytest.raises(WeightsError): load_regressor(tmp_path)

@pytest.mark.parametrize('name,change,says', [('frequencies_', lambda a: a[:-1], 'frequencies_'), ('amplitudes_', lambda a: a[:-1], 'shape'), ('std_', lambda a: 0*a, 'above 0'),
    ('phases_', lambda a: a*np.nan, 'NaN'), ('mean_', lambda a: a[:,None], 'mean_'), ('gamma_', None, 'gamma_')])
def test_wrong_tensor(fitted, tmp_path, name, change, says):
    import hashlib
    fitted['fourier'].save(tmp_path)
    path = tmp_path/'regressor.safetensors'
    arrays = load_file(path)
    if change is None: del arrays[name]
    else: arrays[name] = np.ascontiguousarray(change(arrays[name]))
    save_file(arrays, path)
    about = json.loads((tmp_path/'regressor.json').read_text()); about['sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path/'regressor.json').write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=says): load_regressor(tmp_path)

# -- the layer ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype,tol', [(torch.float32,1e-4), (torch.float64,1e-9)])
def test_layer_gives_the_same_scores(fitted, kind, dtype, tol):
    layer = fitted[kind].to_module(dtype)
    assert not list(layer.parameters()) and all(b.dtype==dtype for b in layer.buffers())
    out = layer(torch.tensor(Z, dtype=dtype))
    assert out.shape==(len(Z),) and out.dtype==dtype
    np.testing.assert_allclose(out, fitted[kind].predict(Z), atol=tol, rtol=0)

@pytest.mark.parametrize('kind', ['exact','fourier'])
def test_layer_is_exported_with_any_batch(fitted, kind, tmp_path):
    layer,z = fitted[kind].to_module(),torch.tensor(Z, dtype=torch.float32)
    graph = torch.export.export(layer, (z[:5],), dynamic_shapes=[{0: torch.export.Dim('faces')}])
    torch.export.save(graph, tmp_path/'layer.pt2')
    again = torch.export.load(tmp_path/'layer.pt2').module()
    for n in (2,120): np.testing.assert_allclose(again(z[:n]), fitted[kind].predict(Z[:n]), atol=1e-4, rtol=0)

def test_layer_follows_a_network(fitted):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), fitted['exact'].to_module()).eval()
    x = torch.randn(4,3,2,2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))

def test_layer_far_from_zero():
    reg = FidelityRegressor().fit(X+300, y)
    np.testing.assert_allclose(reg.to_module()(torch.tensor(Z+300, dtype=torch.float32)), reg.predict(Z+300), atol=1e-4, rtol=0)

def test_layer_refuses_what_float32_cannot_hold():
    reg = FidelityRegressor(gamma=1e6).fit(X, y)
    with pytest.raises(RegressorError, match='float64'): reg.to_module()
    np.testing.assert_allclose(reg.to_module(torch.float64)(torch.tensor(X)), reg.predict(X), atol=1e-6)
