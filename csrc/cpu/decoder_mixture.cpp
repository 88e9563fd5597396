#include "decoder_pass.h"

namespace amq {

void DecoderPass::apply(const Step&, const Mixture&) {}

}  // namespace amq
