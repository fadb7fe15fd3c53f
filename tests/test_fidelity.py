"SSAA and SSAAFormer: symmetry, parity with the published network, shapes, heads"
import os
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from deepfid.core import DeepfidError
from deepfid.models.deepfidelity.ssaa import SSAA
from deepfid.models.deepfidelity.ssaaformer import AttentionBlock, ConvBlock, SSAAFormer, register_with_timm, ssaaformer_small, ssaaformer_tiny

SMALL = dict(depths=(2,1,1,1), dims=(16,16,32,32), head_dim=16)
REF = Path(os.environ.get('DEEPFID_REFERENCE', ''))/'ssaaformer_tiny.safetensors'
needs_reference = pytest.mark.skipif(not (os.environ.get('DEEPFID_REFERENCE') and REF.is_file()), reason='DEEPFID_REFERENCE is not set')

def count(m): return sum(p.numel() for p in m.parameters())
@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

# SSAA

@pytest.mark.parametrize('weights', ['softmax','free'])
def test_the_mirrored_position_is_seen(weights):
    x = torch.randn(1,4,12,16, requires_grad=True)
    SSAA(4, weights)(x)[0,:,5,3].sum().backward()
    seen = x.grad.abs().sum((0,1))>0
    assert seen.sum()==50 and seen[5,3] and seen[5,16-1-3]

def test_no_mirror_no_weight():
    m = SSAA(4, None)
    assert 'w' not in dict(m.named_parameters()) and m.mixing_weights().tolist()==[1,0]
    assert count(SSAA(4))-count(m)==2

def test_equal_weights_give_a_symmetric_map():
    m = SSAA(4); a = m.attend(torch.randn(2,4,8,9))
    assert torch.equal(m.mix(a), m.mix(a).flip(-1))
    m.w.data = torch.tensor([1.,0.])
    assert not torch.allclose(m.mix(a), m.mix(a).flip(-1))

def test_weights_of_both_kinds():
    m = SSAA(4); m.w.data = torch.tensor([300.,299.])
    assert torch.allclose(m.mixing_weights(), torch.tensor([1.,0.]).softmax(0), atol=1e-6)
    f = SSAA(4, 'free'); f.w.data = torch.tensor([2.,-1.]); a = torch.randn(1,4,3,5)
    assert torch.equal(f.mix(a), 2*a - a.flip(-1))

def test_unknown_weights():
    with pytest.raises(DeepfidError, match='softmax'): SSAA(4, 'hard')

# SSAAFormer

@needs_reference
def test_parity_with_the_published_network():
    ref = load_file(REF)
    model = SSAAFormer((2,1,2,1), (32,64,96,128), 32, layer_scale=1e-6, aux_head=True).eval()
    model.load_state_dict({k.removeprefix('state_dict.'): v for k,v in ref.items() if k.startswith('state_dict.')})
    with torch.no_grad():
        x = ref['96.input']; maps = model.stage_maps(x)
        ours = dict(stage1=maps[0], stage2=maps[1], feat_mean=model.embed(x), svr_feature=model.embed(x, 'mean+max'), eval_out=model(x))
    for k,v in ours.items(): assert (v-ref[f'96.{k}']).abs().max()<1e-5, k

@pytest.mark.parametrize('layer_scale,n', [(None,21_034_314), (1e-6,21_043_914)])
def test_parameter_counts_of_small(layer_scale, n):
    with torch.device('meta'): model = SSAAFormer((3,4,8,3), (64,128,320,512), 32, layer_scale=layer_scale, aux_head=True)
    assert count(model)==n

def test_layer_scale_does_not_leak():
    SSAAFormer(**SMALL, layer_scale=1e-6)
    assert not [n for n,_ in SSAAFormer(**SMALL).named_parameters() if 'gamma' in n]

def test_published_key_names():
    keys = set(SSAAFormer(**SMALL, layer_scale=1e-6, aux_head=True).state_dict())
    assert {'patch_embed1.proj.weight','patch_embed1.norm.bias','blocks1.0.w','blocks1.1.conv1.weight','blocks2.0.attn.bias','blocks1.0.conv2.bias',
        'blocks1.0.pos_embed.weight','blocks2.0.norm1.running_mean','blocks1.0.mlp.fc1.weight','blocks3.0.attn.qkv.weight','blocks3.0.attn.proj.bias',
        'blocks4.0.mlp.fc2.bias','blocks4.0.gamma_1','norm.running_var','head.weight','aux_head.bias'} <= keys
    assert 'blocks2.0.w' not in keys
    conv = set(SSAAFormer(**SMALL, conv_stem=True).state_dict())
    assert {'patch_embed1.proj.3.weight','patch_embed1.proj.4.running_mean','patch_embed2.proj.1.bias'} <= conv

@pytest.mark.parametrize('n,has', [(None,'11 0'), (0,'00 0'), (1,'10 0'), (3,'11 1')])
def test_ssaa_blocks(n, has):
    m = SSAAFormer(**SMALL, ssaa_blocks=n)
    assert ' '.join(''.join('01'[hasattr(b, 'w')] for b in blocks) for blocks in (m.blocks1, m.blocks2))==has

def test_impossible_shapes_are_named():
    with pytest.raises(DeepfidError, match='from 0 up to 3'): SSAAFormer(**SMALL, ssaa_blocks=4)
    with pytest.raises(ValueError, match='expected 4'): SSAAFormer((1,1,1), (16,16,32), 16)
    with pytest.raises(ValueError, match='multiple of head_dim'): SSAAFormer((1,1,1,1), (16,16,30,32), 16)
    model = SSAAFormer(**SMALL)
    with pytest.raises(RuntimeError, match='channels'): model(torch.zeros(1,1,64,64))
    with pytest.raises(RuntimeError): model(torch.zeros(1,3,1,1))
    with pytest.raises(DeepfidError, match='mean'): model.eval().embed(torch.zeros(1,3,64,64), 'max')

@pytest.mark.parametrize('conv_stem', [False,True])
@pytest.mark.parametrize('size', [(32,32),(45,77),(112,64)])
def test_any_size_and_channels(conv_stem, size):
    m = SSAAFormer(**SMALL, conv_stem=conv_stem, in_chans=1, num_classes=3).eval()
    assert m(torch.randn(2,1,*size)).shape==(2,3)
    assert [t.shape[1] for t in m.stage_maps(torch.randn(1,1,*size))]==[16,16,32,32]

def test_heads():
    m,x = SSAAFormer(**SMALL, aux_head=True).eval(),torch.randn(2,3,64,64)
    f = m.forward_features(x)
    tokens = f.flatten(2).transpose(1,2)
    assert torch.allclose(m(x), m.head(tokens.mean(1)) + .5*m.aux_head(tokens).max(1)[0], atol=1e-5)
    assert torch.allclose(m.forward_head(f, pre_logits=True), m.embed(x), atol=1e-6)
    assert torch.allclose(m.embed(x, 'mean+max'), tokens.mean(1)+.5*tokens.max(1)[0], atol=1e-6)
    m.train(); assert m.forward_head(f).shape==(2,2)
    m.reset_classifier(7); assert m.get_classifier().out_features==m.aux_head.out_features==7
    m.reset_classifier(0); assert torch.allclose(m.eval()(x), m.embed(x), atol=1e-6)

def test_blocks_without_their_branches_are_their_position_embedding():
    x = torch.randn(1,32,8,8)
    for block in (ConvBlock(32, layer_scale=0.), AttentionBlock(32, layer_scale=0.)):
        assert torch.allclose(block(x), x+block.pos_embed(x), atol=1e-6)

def test_drop_path_rises_and_is_off_at_evaluation():
    m,x = SSAAFormer(**SMALL, drop_path_rate=.4),torch.randn(4,3,32,32)
    assert m.blocks1[0].drop_path.drop_prob==0 and m.blocks4[0].drop_path.drop_prob==pytest.approx(.4)
    m.eval(); assert torch.equal(m(x), m(x))

def test_every_parameter_learns():
    m = SSAAFormer(**SMALL)
    m(torch.randn(2,3,64,64)).pow(2).sum().backward()
    assert not [n for n,p in m.named_parameters() if p.grad is None]

def test_timm_knows_them():
    import timm
    register_with_timm()
    m = timm.create_model('ssaaformer_tiny', num_classes=3)
    assert m.pretrained_cfg['mean']==(.5,.5,.5) and m(torch.zeros(2,3,64,64)).shape==(2,3)
    for f in (ssaaformer_tiny, ssaaformer_small):
        with pytest.raises(DeepfidError, match='no pretrained'): f(pretrained=True)
