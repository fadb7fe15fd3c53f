"The room of deepfid.models.deepfidelity.fused: folding, packing, 16 bits, memory, one graph"
import copy, importlib.util
import numpy as np, pytest, torch
from torch import nn

from deepfid.core import DeepfidError
from deepfid.data.manifest import faces_to_batch
from deepfid.models.deepfidelity import fused as deploy
from deepfid.models.deepfidelity.fused import *
from deepfid.models.deepfidelity.detector import DeepFidelity
from deepfid.models.deepfidelity.regressor import FidelityRegressor
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer, ssaaformer_tiny

SMALL = dict(depths=(2,1,1,1), dims=(16,16,32,32), head_dim=16)
KINDS = dict(scaled=dict(layer_scale=1e-6), stem=dict(conv_stem=True), free=dict(ssaa_weights='free', ssaa_blocks=3), plain=dict(ssaa_blocks=0),
    heads=dict(aux_head=True), grey=dict(in_chans=1), headless=dict(num_classes=0))

@pytest.fixture(autouse=True)
def inference():
    "One thread: waiting for a second one on a busy machine takes longer than all of the work"
    torch.manual_seed(0)
    before = torch.get_num_threads(); torch.set_num_threads(1)
    with torch.inference_mode(): yield
    torch.set_num_threads(before)

def pictures(net, n=3, h=64, w=96): return torch.randn(n, net.in_chans, h, w)

# fold

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('make', [fold, fast, as_written])
def test_the_same_numbers(kind, make):
    net = shake(SSAAFormer(**SMALL, **KINDS[kind]))
    other,x = make(net),pictures(net)
    for f in (lambda m: m(x), lambda m: m.forward_features(x), lambda m: m.embed(x), lambda m: m.embed(x, 'mean+max')):
        assert f(other).shape==f(net).shape and off_by(f(other), f(net))<1e-4

@pytest.mark.parametrize('part', ['pos_embed', 'norm1.running_mean', 'norm1.running_var', 'gamma_1', 'gamma_2', 'norm2.bias', 'norm2.running_var', 'w', 'conv2.bias'])
def test_every_constant_of_a_block_is_folded(part):
    "A change of any of them changes the folded network as it changes the network"
    net = shake(SSAAFormer(**SMALL, layer_scale=1e-6)); x,before = pictures(net),fold(net)
    values = net.blocks1[0].state_dict()
    for k,v in values.items():
        if k.startswith(part) and v.is_floating_point(): v.add_(torch.rand_like(v))
    assert off_by(fold(net)(x), net(x))<1e-4 < 10*off_by(before(x), net(x))

def test_fold_leaves_the_model_alone():
    net = shake(SSAAFormer(**SMALL)).train(); state = {k: v.clone() for k,v in net.state_dict().items()}
    folded = fold(net)
    assert net.training and not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    next(iter(folded.parameters())).zero_()
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_no_batch_norm_is_left():
    assert not [m for m in fold(SSAAFormer(**SMALL, conv_stem=True)).modules() if isinstance(m, nn.BatchNorm2d)]

def test_folding_is_rounded_once():
    "A variance near 0 makes scales of 10^4: in 32 bits the bias would lose its digits"
    bn,conv = nn.BatchNorm2d(8).eval(),nn.Conv2d(8, 8, 1)
    bn.running_var.fill_(1e-8); bn.running_mean.fill_(10.)
    x = 10+1e-3*torch.randn(2, 8, 4, 4)
    layer = fold_linear(conv, bn)
    exact = (conv.double()(bn.double()(x.double())))
    s,t = scale_and_shift(bn)
    assert torch.allclose(layer.weight.double(), conv.weight.flatten(1)*s, rtol=1e-6)
    assert torch.allclose(x.double().permute(0,2,3,1)@layer.weight.double().T+layer.bias.double(), exact.permute(0,2,3,1), rtol=1e-2, atol=1e-2)

def test_same_complaints():
    folded = fold(SSAAFormer(**SMALL))
    with pytest.raises(DeepfidError, match='at least 32x32'): folded(torch.zeros(1,3,16,16))
    with pytest.raises(DeepfidError, match='(B,3,H,W)'): folded(torch.zeros(1,1,64,64))
    with pytest.raises(DeepfidError, match='SSAAFormer, not a Linear'): fold(nn.Linear(2,2))
    with pytest.raises(DeepfidError, match='bfloat16 or None'): fast(SSAAFormer(**SMALL), torch.float16)

# fast

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_products(dtype):
    if not can_pack(dtype): pytest.skip('this torch has no packed products')
    layer = deploy.Linear(64, 128).to(dtype); packed = PackedLinear(layer)
    x,add = torch.randn(2,5,3,64).to(dtype),torch.randn(2,5,3,128).to(dtype)
    for kw in ({}, dict(gelu=True), dict(add=add)):
        got,want = packed(x, **kw),layer(x, **kw)
        assert got.dtype==dtype and off_by(got, want)<(1e-5 if dtype==torch.float32 else .02)

def test_narrow_matrices_are_not_packed():
    seq = pack(nn.Sequential(deploy.Linear(64, 256), nn.Sequential(deploy.Linear(128, 256))))
    assert type(seq[0]) is deploy.Linear and type(seq[1][0]) is PackedLinear

def test_without_packed_products(monkeypatch):
    monkeypatch.setattr(deploy, 'PackedLinear', lambda layer: (_ for _ in ()).throw(AttributeError('gone')))
    net = shake(SSAAFormer(**SMALL)); x = pictures(net)
    assert not can_pack() and off_by(fast(net)(x), net(x))<1e-4

def test_16_bits():
    net = shake(SSAAFormer(**SMALL)); half,x = fast(net, torch.bfloat16),pictures(net)
    out = half(x)
    assert out.dtype==half.forward_features(x).dtype==half.embed(x).dtype==torch.float32
    assert 1e-6 < off_by(out, net(x)) < .05 and (out.softmax(1)-net(x).softmax(1)).abs().max()<.01

def test_a_batch_of_any_number():
    net = fast(shake(SSAAFormer(**SMALL))); x = pictures(net, 5)
    assert off_by(torch.cat([net(x[:1]), net(x[1:])]), net(x))<1e-5

def test_benchmark():
    r = benchmark('ssaaformer_tiny', 64, batch=2, repeats=2, threads=1, device='cpu')
    served = ['OpenVINO', 'OpenVINO, bf16'] if importlib.util.find_spec('openvino') else []
    assert list(r['seconds'])==['as written', 'channels last', 'channels last, autocast', 'fast', 'fast, bf16', *served] and r['speedup']['as written']==1
    assert r['error']['as written']==0 < r['error']['fast']<1e-4 < r['error']['fast, bf16'] and r['score_error']['fast, bf16']<.01
    assert all(len(t)==2 for t in r['times'].values())

@pytest.mark.slow
def test_speed_of_the_published_network():
    r = benchmark('ssaaformer_large', 224, batch=8, repeats=3, threads=2, device='cpu')
    assert r['speedup']['fast']>1 and r['speedup']['fast, bf16']>r['speedup']['channels last, autocast'] and r['error']['fast']<1e-4 and r['score_error']['fast, bf16']<.01

@pytest.mark.slow
def test_compiled():
    net = shake(SSAAFormer(**SMALL)); x = pictures(net)
    with torch.no_grad(): assert off_by(fast(net, compile=True).embed(x), net.embed(x))<1e-4

def test_openvino():
    pytest.importorskip('openvino')
    net = shake(SSAAFormer(**SMALL)).train(); x = pictures(net, 5)
    served = fast(net, compile='openvino')
    assert net.training and net.head.weight.requires_grad
    net.eval()
    for part in (x, x[:1]): assert off_by(served(part), net(part))<1e-4 and off_by(served.embed(part), net.embed(part))<1e-4
    assert served(x).data_ptr()!=served(x).data_ptr() and served(x.double()).dtype==torch.float32
    with pytest.raises(DeepfidError, match='multiples|wants|channels'): served(x[:, :1])
    assert off_by(fast(net, torch.bfloat16, compile='openvino')(x), net(x))<.05

def test_openvino_is_asked_for(monkeypatch):
    net = SSAAFormer(**SMALL)
    with pytest.raises(DeepfidError, match="compile=True, False or 'openvino'"): fast(net, compile='tvm')
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(DeepfidError, match='pip install openvino'): fast(net, compile='openvino')

@pytest.mark.cuda
def test_on_a_gpu():
    net = shake(SSAAFormer(**SMALL)).cuda(); x = pictures(net).cuda()
    quick = fast(net, torch.bfloat16, compile=True)
    first = quick.forward_features(x); kept = first.clone(); quick.forward_features(x+1)
    assert torch.equal(first, kept) and off_by(quick(x), net(x))<.05

# memory

def test_kept_bytes_counts_each_storage_once():
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.randn(10, 10, requires_grad=True)
        assert kept_bytes(lambda: (torch.randn(5,10)@w).exp().sum(), [w])==2*5*10*4
        x = torch.randn(5, 10)
        assert kept_bytes(lambda: (x@w@w).sum(), [w, x])==5*10*4 and kept_bytes(lambda: (x@w@w).sum(), [x])==5*10*4+w.nbytes
        assert kept_bytes(lambda: ((x@w)+(x@w)).sum(), [w])==5*10*4

def test_training_memory():
    with torch.inference_mode(False), torch.enable_grad():
        plain,less = (training_memory('ssaaformer_tiny', 8, 64, on) for on in (False,True))
        assert training_memory('ssaaformer_tiny', 16, 64)['kept']==2*plain['kept']
    assert less['kept']<plain['kept']/4 and plain['recomputed']==0<less['recomputed']<plain['kept'] and less['total']<plain['total']
    assert plain['weights']==plain['total']-plain['kept']==16*sum(p.numel() for p in ssaaformer_tiny().parameters())

def test_norms_of_several_gpus_fold_alike():
    net = shake(SSAAFormer(**SMALL)).eval()
    x, synced = pictures(net, 2, 64, 64), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert (fold(synced)(x)-net(x)).abs().max()<1e-4*net(x).abs().max()

# one graph

@pytest.fixture(scope='module')
def faces(): return [np.random.default_rng(i).integers(0, 256, (80,80,3), dtype=np.uint8) for i in range(5)]

@pytest.fixture(params=['svr', 'head', 'fidelity', 'crop'])
def detector(request, faces):
    "Detectors with small random networks, one for each way to a score"
    with torch.inference_mode(False):
        kw = dict(svr={}, head=dict(mapping=None), fidelity=dict(target='fidelity', regression='head'), crop=dict(pool='mean+max', crop=.875))[request.param]
        d = DeepFidelity(device='cpu', size=64, **kw).configure('tiny')
        d.model = shake(SSAAFormer(**SMALL, num_classes=d.model.num_classes))
        if request.param in ('svr','crop'): d.regressor = FidelityRegressor(scale=True, C=10.).fit(d.features(faces), np.linspace(.1, .9, 5))
        return d

def told(d, faces): return np.array([p.fidelity for p in d.predict(faces)])
def batch(d, faces): return faces_to_batch(faces, d.config['size'])

def test_the_graph_says_what_predict_says(detector, faces):
    want = told(detector, faces)
    assert want.std()>1e-3 and np.abs(fidelity_graph(detector)(batch(detector, faces)).numpy()-want).max()<1e-4

@pytest.mark.parametrize('detector', ['svr', 'crop'], indirect=True)
def test_torch_file(detector, faces, tmp_path):
    path = export_graph(detector, tmp_path/'new'/'g.pt2')
    program = torch.export.load(path).module()
    for n in (1,2,5): assert np.abs(program(batch(detector, faces[:n])).numpy()-told(detector, faces)[:n]).max()<1e-4
    assert [p.name for p in path.parent.iterdir()]==['g.pt2']

@pytest.mark.parametrize('detector', ['svr'], indirect=True)
def test_onnx_file(detector, faces, tmp_path):
    for m in ('onnx','onnxscript'): pytest.importorskip(m)
    runtime = pytest.importorskip('onnxruntime')
    path = export_graph(detector, tmp_path/'g.onnx', 'onnx')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for n in (1,2,5): assert np.abs(session.run(None, dict(image=batch(detector, faces[:n]).numpy()))[0]-told(detector, faces)[:n]).max()<1e-4
    assert [p.name for p in tmp_path.iterdir()]==['g.onnx']

@pytest.mark.parametrize('detector', ['svr'], indirect=True)
def test_a_fixed_number_of_pictures(detector, faces, tmp_path):
    program = torch.export.load(export_graph(detector, tmp_path/'g.pt2', batch=3)).module()
    assert np.abs(program(batch(detector, faces[:3])).numpy()-told(detector, faces)[:3]).max()<1e-4
    with pytest.raises(Exception): program(batch(detector, faces[:2]))

@pytest.mark.parametrize('detector', ['head'], indirect=True)
def test_what_cannot_be_written(detector, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('x')
    for match,args in {'choose one of torch, onnx': (tmp_path/'g', 'tflite'), "or 'dynamic'": (tmp_path/'g', 'torch', 0), 'cannot be written': (tmp_path/'file'/'g.pt2',)}.items():
        with pytest.raises(DeepfidError, match=match) as e: export_graph(detector, *args)
        assert '\n' not in str(e.value)
    with pytest.raises(DeepfidError, match='not trained'): export_graph(DeepFidelity(), tmp_path/'g.pt2')
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(DeepfidError, match='pip install onnx onnxscript'): export_graph(detector, tmp_path/'g', 'onnx')
    assert [p.name for p in tmp_path.iterdir()]==['file']

@pytest.fixture(scope='module', params=['local_similarity', 'lisiam', 'no masks'])
def marking(request, tmp_path_factory):
    from deepfid.models.local_similarity.detector import LocalSimilarity
    if request.param=='no masks': return LocalSimilarity(use_llsm=False, use_flm=False, size=64, pretrained=False).configure('tiny')
    from deepfid.inference.scorer import load
    return load(request.param)

@pytest.mark.parametrize('format', ['torch', 'onnx'])
def test_masks_travel_with_the_score(marking, format, faces, tmp_path):
    if format=='onnx': [pytest.importorskip(m) for m in ('onnx', 'onnxscript')]
    path, seen = export_graph(marking, tmp_path/'g', format), marking.predict(faces[:3])
    if format=='torch':
        with torch.inference_mode(): given = [o.numpy() for o in torch.export.load(path).module()(batch(marking, faces[:3]))]
    else: given = pytest.importorskip('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider']).run(None, dict(image=batch(marking, faces[:3]).numpy()))
    assert len(given)==(1 if seen[0].mask is None else 2) and np.abs(given[0]-[p.fidelity for p in seen]).max()<1e-4
    if seen[0].mask is not None: assert np.abs(given[1]-np.stack([p.mask for p in seen])).max()<1e-4
    if marking.name=='local_similarity' and marking.config['use_llsm']: assert seen[0].similarity is not None and marking.model.llsm is not None
