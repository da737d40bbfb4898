package pushmanager

import "github.com/push-manager/push-manager/transport/roomlog"

// openRoomLogs makes what tells nodes of the logs of rooms, if there is a store.
func (m *PushManager) openRoomLogs(cfg *Config) error {
	if m.store == nil {
		return nil
	}
	logs, err := roomlog.New(roomlog.Config{Logs: m.store, Logger: cfg.Store.Logger, Metrics: cfg.Store.Metrics})
	if err != nil {
		return err
	}
	m.life.Add("room logs", logs.Close)
	cfg.Links.RoomLogs = logs
	return nil
}
