package controller

// NotReady says why the Server should not be asked, nothing when it may. Until etcd has answered
// once, the Server does not know which nodes there are. An etcd that goes away later changes
// nothing.
func (s *Server) NotReady() []string {
	if s.reaper == nil || s.reaper.watcher.Synced() {
		return nil
	}
	why := "etcd: has not answered yet"
	if cause := s.reaper.watcher.Why(); cause != "" {
		why += ": " + cause
	}
	return []string{why}
}
