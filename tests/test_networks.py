"Every SSAAFormer by name: what timm asks of a network, and weights from elsewhere"
import copy
import os
from argparse import Namespace
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from deepfid.core import DeepfidError, WeightsError
from deepfid.models.deepfidelity.checkpoint import load_checkpoint
from deepfid.models.deepfidelity.ssaa import SSAA
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer, TokenOutput, SSAAFORMER_CONFIGS, checkpoint_filter_fn, random_box, register_with_timm, ssaaformer_tiny, swap_box


COUNTS = {'ssaaformer_small': (21_034_314, 21_043_914), 'ssaaformer_small_dim64': (21_034_314, 21_043_914),
    'ssaaformer_small_plus': (23_521_610, 23_532_106), 'ssaaformer_small_plus_dim64': (23_521_610, 23_532_106),
    'ssaaformer_base': (49_265_614, 49_288_270), 'ssaaformer_base_dim64': (49_265_614, 49_288_270), 'ssaaformer_large': (98_788_878, 98_824_462)}
KEYS = {'ssaaformer_small': (336, 372), 'ssaaformer_small_plus': (391, 431), 'ssaaformer_base': (694, 774), 'ssaaformer_large': (794, 886)}
HEADS = {'ssaaformer_small': [10, 16], 'ssaaformer_small_dim64': [5, 8], 'ssaaformer_large': [7, 10]}
SMALL = dict(depths=(1,1,1,1), dims=(16,16,32,32), head_dim=16)

def create(name, **kw):
    "A network of timm's registry, which knows ours by then"
    import timm
    register_with_timm()
    return timm.create_model(name, **kw)

def meta(name, **kw):
    with torch.device('meta'): return create(name, **kw)

def count(m): return sum(p.numel() for p in m.parameters())

@pytest.mark.parametrize('name', COUNTS)
def test_published_parameter_counts(name):
    assert tuple(count(meta(name, layer_scale=ls, aux_head=True)) for ls in (False, 1e-6))==COUNTS[name]

@pytest.mark.parametrize('name', KEYS)
def test_published_number_of_keys(name):
    assert tuple(len(meta(name, layer_scale=ls, aux_head=True).state_dict()) for ls in (False, 1e-6))==KEYS[name]

def test_a_thousand_classes():
    assert [count(meta(n, num_classes=1000, aux_head=True)) for n in ('ssaaformer_small', 'ssaaformer_small_plus', 'ssaaformer_base', 'ssaaformer_large')] \
        == [22_058_262, 24_545_558, 50_289_562, 100_103_898]

@pytest.mark.parametrize('name', HEADS)
def test_heads(name):
    m = meta(name)
    assert [m.blocks3[0].attn.num_heads, m.blocks4[0].attn.num_heads]==HEADS[name]

def test_layer_scale_belongs_to_a_network():
    large, small = meta('ssaaformer_large'), meta('ssaaformer_small')
    assert large.blocks1[0].gamma_1.shape==(1,128,1,1) and large.blocks3[0].gamma_1.shape==(448,)
    assert small.blocks1[0].gamma_1 is None

@pytest.mark.parametrize('name', SSAAFORMER_CONFIGS)
def test_mirrors_are_the_first_stage(name):
    m = meta(name)
    assert [k for k in m.state_dict() if k.endswith('.w')]==[f'blocks1.{j}.w' for j in range(m.depths[0])]

@pytest.mark.parametrize('name', ['ssaaformer_tiny', 'ssaaformer_small_plus'])
def test_timm_interface(name):
    m, x = create(name, num_classes=2).eval(), torch.randn(2,3,64,64)
    with torch.no_grad():
        last = m.forward_features(x)
        assert m.forward_head(last).shape==(2,2) and torch.equal(m.forward_head(last, pre_logits=True), m.embed(x))
        assert torch.equal(m(x), m.forward_head(last))
    assert m.get_classifier() is m.head and m.pretrained_cfg['mean']==(.5,.5,.5)
    m.reset_classifier(7)
    assert m(x).shape==(2,7)

def test_features_only():
    m = create('ssaaformer_tiny', features_only=True, out_indices=(1,3))
    assert [tuple(f.shape) for f in m(torch.zeros(1,3,96,64))]==[(1,32,12,8),(1,128,3,2)]
    assert m.feature_info.channels()==[32,128]

def test_forward_intermediates():
    m, x = ssaaformer_tiny().eval(), torch.randn(1,3,64,64)
    last, maps = m.forward_intermediates(x, norm=True)
    assert len(maps)==4 and torch.equal(maps[-1], last) and torch.equal(last, m.forward_features(x))
    with pytest.raises(DeepfidError, match='NCHW'): m.forward_intermediates(x, output_fmt='NLC')

# -- training options --
def test_token_mixing_only_in_training():
    m, x = SSAAFormer(**SMALL, mix_token=True, aux_head=True), torch.randn(4,3,96,96)
    out = m(x)
    assert isinstance(out, TokenOutput) and out.aux.shape==(4,9,2) and 0<=out.lam<=1
    assert isinstance(m.eval()(x), torch.Tensor)
    assert SSAAFormer(**SMALL, mix_token=True)(x).aux is None

def test_swapping_twice_is_nothing():
    x = torch.randn(5,2,8,8)
    for _ in range(20):
        box = random_box(8, 8)
        assert torch.equal(swap_box(swap_box(x, box), box), x)

def test_share_that_is_swapped():
    torch.manual_seed(0)
    area = torch.tensor([(b-a)*(d-c)/56**2 for a,b,c,d in (random_box(56, 56) for _ in range(4000))])
    assert abs(area.mean()-.31)<.02 and abs((area>.5).float().mean()-.16)<.03 # measured on the released code

@pytest.mark.parametrize('size', [112, 100])
def test_mixing_with_convolution_stems_of_any_size(size):
    assert SSAAFormer(**SMALL, conv_stem=True, mix_token=True, aux_head=True)(torch.randn(2,3,size,size)).aux.shape[0]==2

def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    m, x = SSAAFormer(**SMALL), torch.randn(4,3,64,64)
    def grads(enable):
        m.set_grad_checkpointing(enable)
        m.zero_grad()
        m(x).pow(2).sum().backward()
        return [p.grad.clone() for p in m.parameters()]
    for a,b in zip(grads(False), grads(True)): torch.testing.assert_close(a, b)

def test_checkpointing_counts_each_batch_once():
    torch.manual_seed(0)
    a, x = SSAAFormer(**SMALL), torch.randn(3,4,3,64,64)
    b = copy.deepcopy(a)
    b.set_grad_checkpointing()
    for batch in x: [m(batch).sum().backward() for m in (a, b)]
    for (k, u), v in zip(a.named_buffers(), b.buffers()): torch.testing.assert_close(u, v, msg=k)
    assert b.norm.num_batches_tracked==3 and b.blocks1[0].norm1.momentum==.1

# -- weights from elsewhere --
@pytest.mark.parametrize('more', [dict(best=np.float32(.5), epoch=np.int64(3), done=np.bool_(True)), dict(state_dict_ema=None), dict(state_dict_ema={}, model=None)])
def test_harmless_entries_beside_the_weights(tmp_path, more):
    m, other = SSAAFormer(**SMALL), SSAAFormer(**SMALL)
    torch.save(dict(state_dict=other.state_dict())|more, tmp_path/'c.pth')
    load_checkpoint(m, tmp_path/'c.pth')
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), other.state_dict().values()))

@pytest.mark.parametrize('content', [dict(state_dict=torch.ones(3)), dict(state_dict_ema=torch.tensor(1.)), dict(state_dict=np.float64(1))])
def test_a_tensor_instead_of_weights_is_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path/'c.pth')
    with pytest.raises(WeightsError, match='is missing') as e: load_checkpoint(SSAAFormer(**SMALL), tmp_path/'c.pth')
    assert '\n' not in str(e.value)

def test_filter_unwraps_and_drops_heads():
    m = SSAAFormer(**SMALL, aux_head=True)
    other = SSAAFormer(**SMALL, aux_head=True, num_classes=5)
    averaged = {f'module.{k}': v for k,v in other.state_dict().items()}
    got = checkpoint_filter_fn(dict(state_dict={}, state_dict_ema=averaged, args=Namespace()), m)
    missing, extra = m.load_state_dict(got, strict=False)
    assert not extra and sorted(missing)==['aux_head.bias','aux_head.weight','head.bias','head.weight']
    assert torch.equal(m.norm.weight, other.norm.weight)

def test_the_control_flips_from_top_to_bottom():
    torch.manual_seed(0)
    mirrored, control, x = SSAA(8), SSAA(8, axis=-2), torch.randn(2, 8, 6, 6)
    control.load_state_dict(mirrored.state_dict())
    assert torch.allclose(control(x.transpose(2, 3)), _transposed(mirrored)(x).transpose(2, 3), atol=1e-6)
    assert {b.axis for b in SSAAFormer(**SMALL, axis=-2).modules() if isinstance(b, SSAA)}=={-2}
    with pytest.raises(DeepfidError, match='axis=0'): SSAA(8, axis=0)

def _transposed(block):
    "A block whose depthwise kernel is turned by the diagonal"
    block.attn.weight.data = block.attn.weight.data.transpose(2, 3).contiguous()
    return block

def test_filter_reports_plain_uniformer():
    m, plain = SSAAFormer(**SMALL), SSAAFormer(**SMALL, ssaa_blocks=0)
    with pytest.warns(UserWarning, match='blocks1.0.w'): got = checkpoint_filter_fn(plain.state_dict(), m)
    m.load_state_dict(got)

@pytest.mark.skipif('DEEPFID_REFERENCE' not in os.environ, reason='needs the reference values')
def test_reference_through_the_filter():
    ref = load_file(Path(os.environ['DEEPFID_REFERENCE'])/'ssaaformer_tiny.safetensors')
    m = SSAAFormer((2,1,2,1), (32,64,96,128), 32, layer_scale=1e-6, aux_head=True).eval()
    sd = {k[11:]: v for k,v in ref.items() if k.startswith('state_dict.')}
    m.load_state_dict(checkpoint_filter_fn(dict(state_dict_ema=sd, epoch=3), m))
    with torch.no_grad():
        assert (m.embed(ref['96.input'], 'mean+max')-ref['96.svr_feature']).abs().max()<1e-5
        assert (m(ref['96.input'])-ref['96.eval_out']).abs().max()<1e-5

def test_free_mirrors_say_that_published_weights_are_softmaxed():
    published, m = SSAAFormer(**SMALL).state_dict(), SSAAFormer(**SMALL, ssaa_weights='free')
    with pytest.warns(UserWarning, match="ssaa_weights='softmax'"): checkpoint_filter_fn(published, m)

def test_timms_ways_to_a_head_and_to_weights(tmp_path):
    m = create('ssaaformer_tiny')
    m.reset_classifier(3, 'avg')
    assert m.get_classifier().out_features==3
    with pytest.raises(DeepfidError, match="'max'"): m.reset_classifier(3, 'max')
    other = create('ssaaformer_tiny')
    torch.save(other.state_dict(), tmp_path/'own.pth')
    own = create('ssaaformer_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'own.pth')))
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), other.state_dict().values()))
    with pytest.raises(DeepfidError, match='no pretrained weights'): create('ssaaformer_tiny', pretrained=True)
