#include "bind/register.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "hotloop's CPU loops. Use the functions of the hotloop package, which check their arguments.";
  hotloop::bind::register_core(m);
  hotloop::bind::register_decode(m);
  hotloop::bind::register_decode_search(m);
  hotloop::bind::register_logprob(m);
  hotloop::bind::register_preference(m);
  hotloop::bind::register_table(m);
  hotloop::bind::register_table_updates(m);
  hotloop::bind::register_table_filters(m);
  hotloop::bind::register_table_memory(m);
  hotloop::bind::register_table_multiplex(m);
}
