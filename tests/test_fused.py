"SSAAFormer for inference: folding, packing, 16 bits, OpenVINO, memory of a training step"
import copy
import pytest, torch
from torch import nn

from deepfid.core import DeepfidError
from deepfid.models.deepfidelity import fused
from deepfid.models.deepfidelity.fused import (FusedLinear, PackedLinear, benchmark_ssaaformer, fold_linear, fold_ssaaformer,
    max_relative_error, optimize_for_inference, pack_linears, randomize_norm_stats, saved_tensor_bytes, scale_and_shift, supports_packing,
    training_memory, unfused)
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer, ssaaformer_tiny

SMALL = dict(depths=(2,1,1,1), dims=(16,16,32,32), head_dim=16)
KINDS = dict(scaled=dict(layer_scale=1e-6), stem=dict(conv_stem=True), free=dict(ssaa_weights='free', ssaa_blocks=3), plain=dict(ssaa_blocks=0),
    heads=dict(aux_head=True), grey=dict(in_chans=1), headless=dict(num_classes=0), vertical=dict(axis=-2))

@pytest.fixture(autouse=True)
def inference():
    "One thread: waiting for a second one on a busy machine takes longer than all of the work"
    torch.manual_seed(0)
    before = torch.get_num_threads(); torch.set_num_threads(1)
    with torch.inference_mode(): yield
    torch.set_num_threads(before)

def images(net, n=3, h=64, w=96): return torch.randn(n, net.in_chans, h, w)

# folding

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('make', [fold_ssaaformer, optimize_for_inference, unfused])
def test_the_same_numbers(kind, make):
    net = randomize_norm_stats(SSAAFormer(**SMALL, **KINDS[kind]))
    other,x = make(net),images(net)
    for f in (lambda m: m(x), lambda m: m.forward_features(x), lambda m: m.embed(x), lambda m: m.embed(x, 'mean+max')):
        assert f(other).shape==f(net).shape and max_relative_error(f(other), f(net))<1e-4

@pytest.mark.parametrize('part', ['pos_embed', 'norm1.running_mean', 'norm1.running_var', 'gamma_1', 'gamma_2', 'norm2.bias', 'norm2.running_var', 'w', 'conv2.bias'])
def test_every_constant_of_a_block_is_folded(part):
    "A change of any of them changes the folded network as it changes the network"
    net = randomize_norm_stats(SSAAFormer(**SMALL, layer_scale=1e-6)); x,before = images(net),fold_ssaaformer(net)
    values = net.blocks1[0].state_dict()
    for k,v in values.items():
        if k.startswith(part) and v.is_floating_point(): v.add_(torch.rand_like(v))
    assert max_relative_error(fold_ssaaformer(net)(x), net(x))<1e-4 < 10*max_relative_error(before(x), net(x))

def test_fold_leaves_the_model_alone():
    net = randomize_norm_stats(SSAAFormer(**SMALL)).train(); state = {k: v.clone() for k,v in net.state_dict().items()}
    folded = fold_ssaaformer(net)
    assert net.training and not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    next(iter(folded.parameters())).zero_()
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_no_batch_norm_is_left():
    assert not [m for m in fold_ssaaformer(SSAAFormer(**SMALL, conv_stem=True)).modules() if isinstance(m, nn.BatchNorm2d)]

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

def test_wrong_settings_are_refused():
    with pytest.raises(DeepfidError, match='bfloat16'): optimize_for_inference(SSAAFormer(**SMALL), torch.float16)
    with pytest.raises(DeepfidError, match="'openvino'"): optimize_for_inference(SSAAFormer(**SMALL), compile='tvm')

# packing, 16 bits, compilers

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_products(dtype):
    if not supports_packing(dtype): pytest.skip('this torch has no packed products')
    layer = FusedLinear(64, 128).to(dtype); packed = PackedLinear(layer)
    x,add = torch.randn(2,5,3,64).to(dtype),torch.randn(2,5,3,128).to(dtype)
    for kw in ({}, dict(gelu=True), dict(add=add)):
        got,want = packed(x, **kw),layer(x, **kw)
        assert got.dtype==dtype and max_relative_error(got, want)<(1e-5 if dtype==torch.float32 else .02)

def test_narrow_matrices_are_not_packed():
    seq = pack_linears(nn.Sequential(FusedLinear(64, 256), nn.Sequential(FusedLinear(128, 256))))
    assert type(seq[0]) is FusedLinear and type(seq[1][0]) is PackedLinear

def test_without_packed_products(monkeypatch):
    monkeypatch.setattr(fused, 'PackedLinear', lambda layer: (_ for _ in ()).throw(AttributeError('gone')))
    net = randomize_norm_stats(SSAAFormer(**SMALL)); x = images(net)
    assert not supports_packing() and max_relative_error(optimize_for_inference(net)(x), net(x))<1e-4

def test_16_bits():
    net = randomize_norm_stats(SSAAFormer(**SMALL)); half,x = optimize_for_inference(net, torch.bfloat16),images(net)
    out = half(x)
    assert out.dtype==half.forward_features(x).dtype==half.embed(x).dtype==torch.float32
    assert 1e-6 < max_relative_error(out, net(x)) < .05 and (out.softmax(1)-net(x).softmax(1)).abs().max()<.01

def test_a_batch_of_any_number():
    net = optimize_for_inference(randomize_norm_stats(SSAAFormer(**SMALL))); x = images(net, 5)
    assert max_relative_error(torch.cat([net(x[:1]), net(x[1:])]), net(x))<1e-5

@pytest.mark.slow
def test_speed_of_the_published_network():
    r = benchmark_ssaaformer('ssaaformer_large', 224, batch=8, repeats=3, threads=2, device='cpu')
    assert r['speedup']['fast']>1 and r['speedup']['fast, bf16']>r['speedup']['channels last, autocast'] and r['error']['fast']<1e-4 and r['score_error']['fast, bf16']<.01

@pytest.mark.slow
def test_compiled():
    net = randomize_norm_stats(SSAAFormer(**SMALL)); x = images(net)
    with torch.no_grad(): assert max_relative_error(optimize_for_inference(net, compile=True).embed(x), net.embed(x))<1e-4

def test_openvino():
    pytest.importorskip('openvino')
    net = randomize_norm_stats(SSAAFormer(**SMALL)).train(); x = images(net, 2)
    served = optimize_for_inference(net, compile='openvino')
    assert net.training and net.head.weight.requires_grad
    net.eval()
    assert max_relative_error(served(x), net(x))<1e-4 and max_relative_error(served.embed(x), net.embed(x))<1e-4
    assert served(x).data_ptr()!=served(x).data_ptr() and served(x.double()).dtype==torch.float32
    with pytest.raises(Exception, match='channels'): served(x[:, :1])

def test_openvino_is_missing(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(DeepfidError, match='pip install openvino'): optimize_for_inference(SSAAFormer(**SMALL), compile='openvino')

@pytest.mark.cuda
def test_on_a_gpu():
    net = randomize_norm_stats(SSAAFormer(**SMALL)).cuda(); x = images(net).cuda()
    quick = optimize_for_inference(net, torch.bfloat16, compile=True)
    first = quick.forward_features(x); kept = first.clone(); quick.forward_features(x+1)
    assert torch.equal(first, kept) and max_relative_error(quick(x), net(x))<.05

# memory

def test_kept_bytes_counts_each_storage_once():
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.randn(10, 10, requires_grad=True)
        assert saved_tensor_bytes(lambda: (torch.randn(5,10)@w).exp().sum(), [w])==2*5*10*4
        x = torch.randn(5, 10)
        assert saved_tensor_bytes(lambda: (x@w@w).sum(), [w, x])==5*10*4 and saved_tensor_bytes(lambda: (x@w@w).sum(), [x])==5*10*4+w.nbytes
        assert saved_tensor_bytes(lambda: ((x@w)+(x@w)).sum(), [w])==5*10*4

def test_training_memory():
    with torch.inference_mode(False), torch.enable_grad():
        plain,less = (training_memory('ssaaformer_tiny', 8, 64, on) for on in (False,True))
        assert training_memory('ssaaformer_tiny', 16, 64)['kept']==2*plain['kept']
    assert less['kept']<plain['kept']/4 and plain['recomputed']==0<less['recomputed']<plain['kept'] and less['total']<plain['total']
    assert plain['weights']==plain['total']-plain['kept']==16*sum(p.numel() for p in ssaaformer_tiny().parameters())

def test_norms_of_several_gpus_fold_alike():
    net = randomize_norm_stats(SSAAFormer(**SMALL)).eval()
    x, synced = images(net, 2, 64, 64), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert (fold_ssaaformer(synced)(x)-net(x)).abs().max()<1e-4*net(x).abs().max()
